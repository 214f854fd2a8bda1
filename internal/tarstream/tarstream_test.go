package tarstream

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

func openRoot(t *testing.T, dir string) *os.File {
	t.Helper()
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// manifest describes every file under dir by all that a copy has to keep.
func manifest(t *testing.T, dir string) map[string]string {
	t.Helper()
	m := make(map[string]string)
	inodes := make(map[uint64]string)
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, p)
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		s := fmt.Sprintf("%o %d:%d %d %d.%09d", st.Mode, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		switch d.Type() {
		case fs.ModeSymlink:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			s += " -> " + target
		case 0:
			f, err := os.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			s += fmt.Sprintf(" %x", h.Sum(nil)[:8])
		}
		if st.Nlink > 1 && !d.IsDir() {
			if first, ok := inodes[st.Ino]; ok {
				s += " = " + first
			} else {
				inodes[st.Ino] = rel
			}
		}
		b := make([]byte, 1024)
		n, err := unix.Llistxattr(p, b)
		if err != nil {
			return err
		}
		for name := range strings.SplitSeq(string(b[:n]), "\x00") {
			if keepXattr(name, nil) {
				v := make([]byte, 1024)
				n, err := unix.Lgetxattr(p, name, v)
				if err != nil {
					return err
				}
				s += fmt.Sprintf(" %s=%q", name, v[:n])
			}
		}
		m[rel] = s
		return nil
	}))
	return m
}

func fileCaps() []byte {
	b := make([]byte, capSize2)
	b[3], b[4] = 2, 0x20 // VFS_CAP_REVISION_2; permitted: a bit
	return b
}

// makeTree makes a directory with every type of file but sockets.
func makeTree(t *testing.T, dir string) {
	t.Helper()
	at := func(p string) string { return filepath.Join(dir, p) }
	must(t,
		os.MkdirAll(at("d/e/f"), 0o755),
		os.WriteFile(at("d/file"), []byte("content"), 0o644),
		os.WriteFile(at("empty"), nil, 0o600),
		os.WriteFile(at("d/suid"), []byte("#!"), 0o755),
		os.Chown(at("d/suid"), 12, 34),
		unix.Chmod(at("d/suid"), 0o6755),
		unix.Setxattr(at("d/suid"), capability, fileCaps(), 0),
		unix.Setxattr(at("d/file"), "user.note", []byte("a\x00b"), 0),
		os.Link(at("d/file"), at("d/e/hard")),
		os.Symlink("../nowhere", at("d/link")),
		os.Lchown(at("d/link"), 5, 6),
		os.Link(at("d/link"), at("hardlink-to-link")),
		unix.Mkfifo(at("fifo"), 0o640),
		unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mknod(at("block"), unix.S_IFBLK|0o600, int(unix.Mkdev(7, 200))),
		os.WriteFile(at("name with \n and \xff"), []byte("x"), 0o644),
		os.WriteFile(at(strings.Repeat("n", 200)), []byte("long"), 0o644),
		os.WriteFile(at("large"), bytes.Repeat([]byte("0123456789abcdef"), 100_000), 0o644),
		unix.Chmod(at("d/e"), 0o1777),
		os.Chmod(at("d/e/f"), 0),
	)
	sparse, err := os.Create(at("sparse"))
	must(t, err)
	_, err1 := sparse.WriteAt([]byte("begin"), 0)
	_, err2 := sparse.WriteAt([]byte("middle"), 5<<20)
	must(t, err1, err2, sparse.Truncate(12<<20+1), sparse.Close())
	must(t, unix.Setxattr(at("sparse"), "user.hole", []byte("y"), 0))
	when := unix.Timespec{Sec: 1234567890, Nsec: 123456789}
	before1970 := unix.Timespec{Sec: -5}
	for _, p := range []string{"d/file", "d/link", "fifo", "sparse", "d/e", "d"} {
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, at(p), []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW))
	}
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, at("empty"), []unix.Timespec{before1970, before1970}, 0))
}

// pipe copies with Write and then extract.
func pipe(write func(io.Writer) error, extract func(io.Reader) error) error {
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := write(w)
		w.CloseWithError(err)
		done <- err
	}()
	err := extract(r)
	r.CloseWithError(errors.New("extraction has ended"))
	return errors.Join(err, <-done)
}

func TestRoundTrip(t *testing.T) {
	testenv.Root(t)
	testenv.NoFDLeak(t)
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src)
	s, d := openRoot(t, src), openRoot(t, dst)
	err := pipe(func(w io.Writer) error { return Write(t.Context(), s, ".", w, Options{}) },
		func(r io.Reader) error { return Extract(t.Context(), d, "/", r, Options{}) })
	must(t, err)
	want, got := manifest(t, src), manifest(t, dst)
	delete(want, ".") // the directory that is extracted into keeps its own
	delete(got, ".")
	if len(want) < 16 {
		t.Fatalf("the tree has %d files only", len(want))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("copy differs (-want +got):\n%s", diff)
	}
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(dst, "sparse"), &st))
	if st.Blocks*512 > 1<<20 {
		t.Errorf("the copy of the sparse file takes %d bytes", st.Blocks*512)
	}
}

// TestTarReadsIt compares with what tar(1), not our own reader, makes of it.
func TestTarReadsIt(t *testing.T) {
	testenv.Root(t)
	bin := testenv.Program(t, "tar")
	src, dst := t.TempDir(), t.TempDir()
	makeTree(t, src)
	var b bytes.Buffer
	must(t, Write(t.Context(), openRoot(t, src), ".", &b, Options{}))
	cmd := exec.Command(bin, "-x", "-p", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-C", dst)
	cmd.Stdin = &b
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	want, got := manifest(t, src), manifest(t, dst)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what tar unpacks differs (-want +got):\n%s", diff)
	}
}

func TestHugeSparseFile(t *testing.T) {
	testenv.Root(t)
	src, dst := t.TempDir(), t.TempDir()
	f, err := os.Create(filepath.Join(src, "huge"))
	must(t, err)
	const size = 10 << 30
	_, err = f.WriteAt([]byte("end"), size-3)
	must(t, err, f.Close())
	s, d := openRoot(t, src), openRoot(t, dst)
	streamed := &counter{}
	begin := time.Now()
	must(t, pipe(func(w io.Writer) error { return Write(t.Context(), s, "huge", io.MultiWriter(w, streamed), Options{}) },
		func(r io.Reader) error { return Copy(t.Context(), d, "copy", r, Options{}) }))
	t.Logf("took %v", time.Since(begin))
	if streamed.n > 1<<20 {
		t.Errorf("the stream is %d bytes long", streamed.n)
	}
	var st unix.Stat_t
	must(t, unix.Stat(filepath.Join(dst, "copy"), &st))
	if st.Size != size || st.Blocks*512 > 1<<20 {
		t.Errorf("the copy is %d bytes long and takes %d", st.Size, st.Blocks*512)
	}
}

type counter struct{ n int64 }

func (c *counter) Write(b []byte) (int, error) { c.n += int64(len(b)); return len(b), nil }

func TestManyHoles(t *testing.T) {
	testenv.Root(t)
	src, dst := t.TempDir(), t.TempDir()
	f, err := os.Create(filepath.Join(src, "f"))
	must(t, err)
	for i := range maxParts + 100 {
		_, err := f.WriteAt([]byte{byte(i), 1}, int64(i)*8192)
		must(t, err)
	}
	if parts := dataParts(f, (maxParts+100)*8192); len(parts) > maxParts+1 {
		t.Errorf("the map has %d parts", len(parts))
	}
	must(t, f.Close())
	s, d := openRoot(t, src), openRoot(t, dst)
	must(t, pipe(func(w io.Writer) error { return Write(t.Context(), s, "f", w, Options{}) },
		func(r io.Reader) error { return Copy(t.Context(), d, "f", r, Options{}) }))
	if want, got := manifest(t, src)["f"], manifest(t, dst)["f"]; want != got {
		t.Errorf("copy is %s, want %s", got, want)
	}
}

func TestCopyFollowsDockersRules(t *testing.T) {
	testenv.Root(t)
	src := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(src, "dir/sub"), 0o755), os.WriteFile(filepath.Join(src, "dir/sub/x"), nil, 0o644),
		os.WriteFile(filepath.Join(src, "file"), []byte("new"), 0o644))
	tests := []struct {
		src, dest string
		want      string // a path that must exist afterwards; "" is an error
	}{
		{"file", "exists", "exists/file"},
		{"file", "exists/", "exists/file"},
		{"file", "name", "name"},
		{"file", "name/", ""},
		{"file", "no/name", ""},
		{"file", "old", "old"},
		{"file", "to-old", "old"},
		{"file", "to-nothing", "nothing"},
		{"dir", "exists", "exists/dir/sub/x"},
		{"dir/.", "exists", "exists/sub/x"},
		{"dir", "name", "name/sub/x"},
		{"dir/.", "name", "name/sub/x"},
		{"dir/", "name/", "name/sub/x"},
		{"dir", "old", ""},
		{"dir", "to-exists", "exists/dir/sub/x"},
	}
	for _, tt := range tests {
		t.Run(strings.ReplaceAll(tt.src+" to "+tt.dest, "/", "|"), func(t *testing.T) {
			dst := t.TempDir()
			must(t, os.Mkdir(filepath.Join(dst, "exists"), 0o755), os.WriteFile(filepath.Join(dst, "old"), []byte("old"), 0o644),
				os.Symlink("old", filepath.Join(dst, "to-old")), os.Symlink("/nothing", filepath.Join(dst, "to-nothing")),
				os.Symlink("/exists", filepath.Join(dst, "to-exists")))
			before := manifest(t, dst)
			s, d := openRoot(t, src), openRoot(t, dst)
			err := pipe(func(w io.Writer) error { return Write(t.Context(), s, tt.src, w, Options{}) },
				func(r io.Reader) error { return Copy(t.Context(), d, tt.dest, r, Options{}) })
			if tt.want == "" {
				if err == nil {
					t.Error("no error")
				}
				if diff := cmp.Diff(before, manifest(t, dst)); diff != "" {
					t.Errorf("something was changed (-before +after):\n%s", diff)
				}
				return
			}
			must(t, err)
			fi, err := os.Lstat(filepath.Join(dst, tt.want))
			if err != nil || !fi.Mode().IsRegular() {
				t.Errorf("%s: %v, %v", tt.want, fi, err)
			}
			if b, _ := os.ReadFile(filepath.Join(dst, tt.want)); tt.src == "file" && string(b) != "new" {
				t.Errorf("%s holds %q", tt.want, b)
			}
		})
	}
}

// archive is a tar stream of these entries.
func archive(t *testing.T, hs ...*tar.Header) io.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if h.Typeflag == tar.TypeReg {
			h.Size = 5
		}
		must(t, w.WriteHeader(h))
		if h.Typeflag == tar.TypeReg {
			_, err := w.Write([]byte("pwned"))
			must(t, err)
		}
	}
	must(t, w.Close())
	return &b
}

func TestExtractStaysInside(t *testing.T) {
	testenv.Root(t)
	file := func(name string) *tar.Header { return &tar.Header{Typeflag: tar.TypeReg, Name: name} }
	sym := func(name, to string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to}
	}
	hard := func(name, to string) *tar.Header {
		return &tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}
	}
	tests := []struct {
		name string
		hs   []*tar.Header
		ok   bool
	}{
		{"dots", []*tar.Header{file("../victim")}, false},
		{"dots inside", []*tar.Header{file("a/../../victim")}, false},
		{"dots that stay inside", []*tar.Header{file("a/../b")}, false},
		{"absolute", []*tar.Header{file("/victim")}, true},
		{"through its own link", []*tar.Header{sym("l", "../outside"), file("l/victim")}, false},
		{"through its own absolute link", []*tar.Header{sym("l", "/"), file("l/victim")}, false},
		{"onto its own link", []*tar.Header{sym("l", "../outside/victim"), file("l")}, true},
		{"directory onto a link", []*tar.Header{sym("l", "../outside"), {Typeflag: tar.TypeDir, Name: "l", Mode: 0o777}}, false},
		{"through a planted link", []*tar.Header{file("planted/victim")}, false},
		{"hard link to outside", []*tar.Header{hard("h", "../outside/victim")}, false},
		{"hard link through a link", []*tar.Header{sym("l", "../outside"), hard("h", "l/victim"), file("h")}, false},
		{"hard link to a planted link", []*tar.Header{hard("h", "planted"), file("h")}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			top := t.TempDir()
			must(t, os.Mkdir(filepath.Join(top, "outside"), 0o700), os.Mkdir(filepath.Join(top, "in"), 0o755),
				os.WriteFile(filepath.Join(top, "outside/victim"), []byte("safe"), 0o600),
				os.Symlink("../outside", filepath.Join(top, "in/planted")))
			before := manifest(t, filepath.Join(top, "outside"))
			err := Extract(t.Context(), openRoot(t, filepath.Join(top, "in")), ".", archive(t, tt.hs...), Options{})
			if (err == nil) != tt.ok {
				t.Errorf("Extract = %v, want success %v", err, tt.ok)
			}
			if diff := cmp.Diff(before, manifest(t, filepath.Join(top, "outside"))); diff != "" {
				t.Errorf("outside was changed (-before +after):\n%s", diff)
			}
			if _, err := os.Lstat(filepath.Join(top, "victim")); err == nil {
				t.Error("a file was made outside")
			}
		})
	}
}

func TestWriteStaysInside(t *testing.T) {
	testenv.Root(t)
	top := t.TempDir()
	in := filepath.Join(top, "in")
	must(t, os.Mkdir(in, 0o755), os.Mkdir(filepath.Join(in, "etc"), 0o755),
		os.WriteFile(filepath.Join(top, "secret"), []byte("secret"), 0o600),
		os.Symlink("../../../../../../secret", filepath.Join(in, "up")), os.Symlink("..", filepath.Join(in, "dotdot")),
		os.Symlink("/proc/self/root", filepath.Join(in, "magic")))
	r := openRoot(t, in)
	for _, name := range []string{"../secret", "up/", "/dotdot/secret", "dotdot/../secret", "magic/etc/passwd"} {
		var b bytes.Buffer
		if err := Write(t.Context(), r, name, &b, Options{}); err == nil {
			t.Errorf("Write(%q) wrote %d bytes", name, b.Len())
		}
	}
	var b bytes.Buffer
	must(t, Write(t.Context(), r, "/", &b, Options{}))
	if got := names(t, &b); len(got) != 5 {
		t.Errorf("a link was followed: entries %q", got)
	}
}

func names(t *testing.T, r io.Reader) []string {
	t.Helper()
	var ns []string
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return ns
		}
		must(t, err)
		ns = append(ns, h.Name)
	}
}

// TestRaces swaps a directory for a symbolic link that leads outside, as fast as
// it can, while it is copied out of and into.
func TestRaces(t *testing.T) {
	testenv.Root(t)
	top := t.TempDir()
	in, outside := filepath.Join(top, "in"), filepath.Join(top, "outside")
	must(t, os.MkdirAll(filepath.Join(in, "d"), 0o755), os.Mkdir(outside, 0o755), os.Symlink("../outside", filepath.Join(in, "l")),
		os.WriteFile(filepath.Join(outside, "secret"), []byte("SECRET"), 0o644), os.WriteFile(filepath.Join(in, "d/secret"), []byte("public"), 0o644))
	before := manifest(t, outside)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	swaps := 0
	wg.Go(func() {
		for ; ctx.Err() == nil; swaps++ {
			unix.Renameat2(unix.AT_FDCWD, filepath.Join(in, "d"), unix.AT_FDCWD, filepath.Join(in, "l"), unix.RENAME_EXCHANGE)
		}
	})
	r := openRoot(t, in)
	var asDir, asLink, extracted, refused int
	for ctx.Err() == nil {
		for _, name := range []string{"/", "d/", "d/secret"} {
			var b bytes.Buffer
			if err := Write(t.Context(), r, name, &b, Options{}); err == nil && bytes.Contains(b.Bytes(), []byte("SECRET")) {
				t.Fatalf("%s: what is outside was copied", name)
			} else if err == nil && name == "d/secret" {
				asDir++
			} else if err != nil {
				asLink++
			}
		}
		err := Extract(t.Context(), r, "/", archive(t,
			&tar.Header{Typeflag: tar.TypeReg, Name: "d/secret"}, &tar.Header{Typeflag: tar.TypeReg, Name: "d/new/file"}), Options{})
		if err == nil {
			extracted++
		} else {
			refused++
		}
	}
	cancel()
	wg.Wait()
	if diff := cmp.Diff(before, manifest(t, outside)); diff != "" {
		t.Errorf("outside was changed (-before +after):\n%s", diff)
	}
	if swaps == 0 || asDir == 0 || asLink == 0 || extracted == 0 || refused == 0 {
		t.Errorf("no race: %d swaps, read %d times and not %d times, written %d times and not %d times", swaps, asDir, asLink, extracted, refused)
	}
}

func TestWriteLeavesOutAndNotes(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "sock"))
	must(t, err)
	defer l.Close()
	must(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600), os.Mkdir(filepath.Join(dir, "proc"), 0o755), os.Mkdir(filepath.Join(dir, "tmp"), 0o755))
	must(t, unix.Mount("proc", filepath.Join(dir, "proc"), "proc", 0, ""))
	defer unix.Unmount(filepath.Join(dir, "proc"), unix.MNT_DETACH)
	must(t, unix.Mount("tmpfs", filepath.Join(dir, "tmp"), "tmpfs", 0, ""))
	defer unix.Unmount(filepath.Join(dir, "tmp"), unix.MNT_DETACH)
	must(t, os.WriteFile(filepath.Join(dir, "tmp/kept"), nil, 0o600))
	notes := make(map[string]string)
	var b bytes.Buffer
	o := Options{Note: func(p, what string) { notes[p] = what }}
	must(t, Write(t.Context(), openRoot(t, dir), "/", &b, o))
	got := names(t, &b)
	slices.Sort(got)
	if want := []string{"./", "./fifo", "./proc/", "./tmp/", "./tmp/kept"}; !slices.Equal(got, want) {
		t.Errorf("entries %q, want %q", got, want)
	}
	if len(notes) != 2 || notes["./sock"] == "" || notes["./proc"] == "" {
		t.Errorf("notes %q", notes)
	}
	if err := Write(t.Context(), openRoot(t, dir), "proc/self", &b, o); err == nil || !strings.Contains(err.Error(), "proc") {
		t.Errorf("Write in proc = %v", err)
	}
}

// TestFileChanges has a reader of the stream change the file behind its header.
func TestFileChanges(t *testing.T) {
	testenv.Root(t)
	for _, size := range []int64{1 << 20, 5 << 20} {
		dir := t.TempDir()
		file := filepath.Join(dir, "f")
		must(t, os.WriteFile(file, bytes.Repeat([]byte("x"), 3<<20), 0o600))
		var notes []string
		r, w := io.Pipe()
		go func() {
			w.CloseWithError(Write(t.Context(), openRoot(t, dir), "f", w, Options{Note: func(_, what string) { notes = append(notes, what) }}))
		}()
		tr := tar.NewReader(r)
		h, err := tr.Next()
		must(t, err, os.Truncate(file, size))
		n, err := io.Copy(io.Discard, tr)
		must(t, err)
		_, err = tr.Next()
		if n != h.Size || err != io.EOF || len(notes) != 1 {
			t.Errorf("after a change to %d: read %d of %d, then %v; notes %q", size, n, h.Size, err, notes)
		}
	}
}

func TestUserNamespaceIDs(t *testing.T) {
	testenv.Root(t)
	src, dst := t.TempDir(), t.TempDir()
	ids := &IDs{500000, 65536}
	must(t, os.WriteFile(filepath.Join(src, "f"), nil, 0o644), os.Chown(filepath.Join(src, "f"), 500007, 500000),
		os.WriteFile(filepath.Join(src, "foreign"), nil, 0o644), os.Chown(filepath.Join(src, "foreign"), 3, 500001))
	must(t, unix.Setxattr(filepath.Join(src, "f"), capability, capabilityOutside(fileCaps(), ids), 0))
	var b bytes.Buffer
	must(t, Write(t.Context(), openRoot(t, src), ".", &b, Options{IDs: ids}))
	for tr := tar.NewReader(bytes.NewReader(b.Bytes())); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		switch h.Name {
		case "./f":
			if h.Uid != 7 || h.Gid != 0 || h.PAXRecords[xattrPrefix+capability] != string(fileCaps()) {
				t.Errorf("f has ids %d:%d and attributes %q", h.Uid, h.Gid, h.PAXRecords)
			}
		case "./foreign":
			if h.Uid != overflowID || h.Gid != 1 {
				t.Errorf("foreign has ids %d:%d", h.Uid, h.Gid)
			}
		}
	}
	must(t, Extract(t.Context(), openRoot(t, dst), ".", &b, Options{IDs: ids}))
	if want, got := manifest(t, src)["f"], manifest(t, dst)["f"]; got != want {
		t.Errorf("copy is %s, want %s", got, want)
	}
	err := Extract(t.Context(), openRoot(t, dst), ".", archive(t, &tar.Header{Typeflag: tar.TypeFifo, Name: "x", Uid: 65536}), Options{IDs: ids})
	if err == nil || !strings.Contains(err.Error(), "65536") {
		t.Errorf("Extract of an id outside = %v", err)
	}
}

func TestDepth(t *testing.T) {
	testenv.Root(t)
	dir, dst := t.TempDir(), t.TempDir()
	deep := func(levels int) {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		for range levels {
			if err := unix.Mkdirat(fd, "d", 0o755); err != nil && err != unix.EEXIST {
				t.Fatal(err)
			}
			next, err := unix.Openat(fd, "d", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			unix.Close(fd)
			must(t, err)
			fd = next
		}
		unix.Close(fd)
	}
	deep(maxDepth - 1)
	s, d := openRoot(t, dir), openRoot(t, dst)
	must(t, pipe(func(w io.Writer) error { return Write(t.Context(), s, ".", w, Options{}) },
		func(r io.Reader) error { return Extract(t.Context(), d, ".", r, Options{}) }))
	deep(maxDepth)
	if err := Write(t.Context(), s, ".", io.Discard, Options{}); err == nil || !strings.Contains(err.Error(), "nested deeper") {
		t.Errorf("Write of %d levels = %v", maxDepth+1, err)
	}
}

func TestExtractReplaces(t *testing.T) {
	testenv.Root(t)
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "d"), 0o755), os.WriteFile(filepath.Join(dir, "f"), []byte("old"), 0o644),
		os.WriteFile(filepath.Join(dir, "mounted"), []byte("under"), 0o644), os.WriteFile(filepath.Join(dir, "source"), []byte("much longer"), 0o644))
	must(t, unix.Mount(filepath.Join(dir, "source"), filepath.Join(dir, "mounted"), "", unix.MS_BIND, ""))
	defer unix.Unmount(filepath.Join(dir, "mounted"), unix.MNT_DETACH)
	r := openRoot(t, dir)
	file := func(n string) io.Reader { return archive(t, &tar.Header{Typeflag: tar.TypeReg, Name: n}) }
	must(t, Extract(t.Context(), r, ".", file("f"), Options{}), Extract(t.Context(), r, ".", file("mounted"), Options{}))
	for _, n := range []string{"f", "mounted", "source"} {
		if b, err := os.ReadFile(filepath.Join(dir, n)); string(b) != "pwned" || err != nil {
			t.Errorf("%s holds %q, %v", n, b, err)
		}
	}
	if err := Extract(t.Context(), r, ".", file("d"), Options{}); !errors.Is(err, unix.EISDIR) {
		t.Errorf("a file over a directory = %v", err)
	}
	if err := Extract(t.Context(), r, ".", archive(t, &tar.Header{Typeflag: tar.TypeDir, Name: "f"}), Options{}); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a directory over a file = %v", err)
	}
}
