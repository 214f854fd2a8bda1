package sandbox

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/statefile"
)

// StatusReader is the part of a [MemberNode] that shows what a monitor has left.
type StatusReader interface {
	MonitorStatus(m *MemberRecord, dir string) (MonitorStatus, error)
	HeldTmpfs(m *MemberRecord, dir string) int64
}

// Dir reads a state directory, whether or not a daemon runs. It changes
// nothing, takes no lock, and keeps no file open. What it shows is what is on
// disk and what the kernel says about the processes named there.
type Dir struct {
	path string
	view view
}

// OpenDir returns a Dir for the state directory, which must exist.
func OpenDir(state string, r StatusReader) (*Dir, error) {
	path, err := filepath.Abs(state)
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.IsDir() {
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("not a directory")}
	}
	return &Dir{path: path, view: view{status: r, alive: procid.ID.Alive}}, nil
}

// dirBox is one sandbox as it is on disk.
type dirBox struct {
	rec     *Record
	members []dirMember
}

type dirMember struct {
	rec *MemberRecord
	dir string
}

func (b dirBox) id() string      { return b.rec.ID }
func (b dirBox) name() string    { return b.rec.Config.Name }
func (m dirMember) id() string   { return m.rec.ID }
func (m dirMember) name() string { return m.rec.Config.Name }

// sandboxes reads the record of every sandbox. What cannot be read is shown as
// unclean, as the daemon would show it; what goes away meanwhile is not there.
// With a ref, those that it cannot mean are left out, without what most of the time
// goes into: their records are not decoded.
func sandboxes(root *os.Root, ref string) []dirBox {
	var boxes []dirBox
	for _, id := range ids(root, sandboxesDir) {
		if ref != "" && !strings.HasPrefix(id, ref) {
			// A name is in the file as it is: it has nothing that JSON would escape.
			data, err := statefile.Bytes(root, sandboxesDir+"/"+id+"/"+sandboxFile)
			if err == nil && !bytes.Contains(data, []byte(`"`+ref+`"`)) {
				continue
			}
		}
		r, err := readRecord(root, sandboxesDir+"/"+id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			r = &Record{ID: id, State: Unclean, Config: Config{Name: id}, Reason: "the record cannot be read: " + err.Error()}
		}
		boxes = append(boxes, dirBox{rec: r})
	}
	return boxes
}

// readMembers reads the records of the sandbox's members, like [sandboxes].
func (d *Dir) readMembers(root *os.Root, b *dirBox) {
	dir := sandboxesDir + "/" + b.rec.ID + "/" + membersDir
	for _, id := range ids(root, dir) {
		r, err := readMemberRecord(root, dir+"/"+id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			r = placeholderMember(b.rec, id, err)
		}
		b.members = append(b.members, dirMember{r, filepath.Join(d.path, dir, id)})
	}
}

// box returns the sandbox that ref names, with its members. A full id is looked
// up without reading the others' records.
func (d *Dir) box(ref string) (dirBox, error) {
	root, err := os.OpenRoot(d.path)
	if err != nil {
		return dirBox{}, err
	}
	defer root.Close()
	var b dirBox
	if isID(ref) {
		b.rec, _ = readRecord(root, sandboxesDir+"/"+ref)
	}
	if b.rec == nil {
		if b, err = find("sandbox", ref, sandboxes(root, ref), ""); err != nil {
			return dirBox{}, err
		}
	}
	d.readMembers(root, &b)
	return b, nil
}

// ids returns the names in dir that are ids.
func ids(root *os.Root, dir string) []string {
	ents, err := fs.ReadDir(root.FS(), dir)
	if err != nil {
		return nil // no daemon has been here yet, or the sandbox has just gone
	}
	var names []string
	for _, e := range ents {
		if e.IsDir() && isID(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names
}

func (d *Dir) memberInfo(b dirBox, m dirMember) MemberInfo {
	i := d.view.member(b.rec, m.rec, m.dir)
	i.Hooks = withOutputs(m.rec.HookRuns, m.dir)
	return i
}

func (d *Dir) info(b dirBox) Info {
	var ms []MemberInfo
	for _, m := range b.members {
		ms = append(ms, d.memberInfo(b, m))
	}
	i := d.view.sandbox(b.rec, ms)
	i.Hooks = withOutputs(b.rec.HookRuns, filepath.Join(d.path, sandboxesDir, b.rec.ID))
	return i
}

// List returns all sandboxes, ordered by the time of their creation.
func (d *Dir) List() ([]Info, error) {
	root, err := os.OpenRoot(d.path)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	infos := []Info{}
	for _, b := range sandboxes(root, "") {
		d.readMembers(root, &b)
		infos = append(infos, brief(d.info(b)))
	}
	sortInfos(infos)
	return infos, nil
}

// Sandbox returns what is known about a sandbox.
func (d *Dir) Sandbox(ref string) (Info, error) {
	b, err := d.box(ref)
	if err != nil {
		return Info{}, err
	}
	i := d.info(b)
	describe(d.path, i.Members)
	return i, nil
}

func (d *Dir) member(ref string) (dirBox, dirMember, error) {
	s, name, err := splitRef(ref)
	if err != nil {
		return dirBox{}, dirMember{}, err
	}
	b, err := d.box(s)
	if err != nil {
		return dirBox{}, dirMember{}, err
	}
	m, err := findMember(name, b.members, b.name())
	return b, m, err
}

// Member returns what is known about a member.
func (d *Dir) Member(ref string) (MemberInfo, error) {
	b, m, err := d.member(ref)
	if err != nil {
		return MemberInfo{}, err
	}
	i := []MemberInfo{d.memberInfo(b, m)}
	describe(d.path, i)
	return i[0], nil
}

// MemberDir returns the absolute path of a member's state directory.
func (d *Dir) MemberDir(ref string) (string, error) {
	_, m, err := d.member(ref)
	return m.dir, err
}

// MemberConfig reads the OCI configuration that m was made from into part, which
// may have only some of its fields: to read all of them takes longer than to start
// a process.
func (d *Dir) MemberConfig(m *MemberRecord, part any) error {
	root, err := os.OpenRoot(filepath.Join(d.path, sandboxesDir, m.Sandbox, membersDir, m.ID))
	if err != nil {
		return err
	}
	defer root.Close()
	return statefile.ReadPart(root, specFile, part)
}

// Records returns the records behind ref, a sandbox or SANDBOX/MEMBER, for what
// is done without the daemon. For a sandbox m is nil and dir empty. siblings
// are the other members: all of them if ref is a sandbox.
func (d *Dir) Records(ref string) (r *Record, m *MemberRecord, dir string, siblings []*MemberRecord, err error) {
	var b dirBox
	if _, _, serr := splitRef(ref); serr == nil {
		var dm dirMember
		if b, dm, err = d.member(ref); err != nil {
			return nil, nil, "", nil, err
		}
		m, dir = dm.rec, dm.dir
	} else if b, err = d.box(ref); err != nil {
		return nil, nil, "", nil, err
	}
	for _, other := range b.members {
		if m == nil || other.rec.ID != m.ID {
			siblings = append(siblings, other.rec)
		}
	}
	return b.rec, m, dir, siblings, nil
}

// readRecord reads and checks the record of the sandbox whose directory is dir.
func readRecord(root *os.Root, dir string) (*Record, error) {
	var r Record
	if err := statefile.Read(root, dir+"/"+sandboxFile, &r); err != nil {
		return nil, err
	}
	if err := checkRecord(&r, filepath.Base(dir)); err != nil {
		return nil, err
	}
	return &r, nil
}

// readMemberRecord is readRecord for a member.
func readMemberRecord(root *os.Root, dir string) (*MemberRecord, error) {
	var r MemberRecord
	if err := statefile.Read(root, dir+"/"+memberFile, &r); err != nil {
		return nil, err
	}
	sandbox := filepath.Base(filepath.Dir(filepath.Dir(dir)))
	if err := checkMemberRecord(&r, sandbox, filepath.Base(dir)); err != nil {
		return nil, err
	}
	return &r, nil
}
