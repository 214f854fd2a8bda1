package collect

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/cgroup"
	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/request"
)

// manifestVersion is written into every manifest.
const manifestVersion = 1

// Manifest is what is known of a member: at its exit, or, if it is made for
// somebody who asks, at that moment. docs/collect/manifest.schema.json describes
// its JSON form, which is stable: fields are added, never renamed or removed.
type Manifest struct {
	Version     int               `json:"version"`
	Name        string            `json:"name,omitempty"` // SANDBOX/MEMBER-N; empty if it is no collection's
	Sandbox     string            `json:"sandbox"`
	SandboxID   string            `json:"sandboxId"`
	Member      string            `json:"member"`
	MemberID    string            `json:"memberId"`
	State       string            `json:"state,omitempty"` // only if it is no collection's
	Command     []string          `json:"command"`
	Labels      map[string]string `json:"labels,omitempty"`
	CreatedAt   time.Time         `json:"createdAt"`
	StartedAt   time.Time         `json:"startedAt,omitzero"` // absent if it never ran its command
	CollectedAt time.Time         `json:"collectedAt"`
	Exit        *exit.Record      `json:"exit,omitempty"` // absent while it runs
	StartError  string            `json:"startError,omitempty"`
	Counters    cgroup.Usage      `json:"counters"`
	Network     []Interface       `json:"network"` // of the sandbox
	Log         Log               `json:"log"`
	Mounts      []Mount           `json:"mounts"` // file systems in the root, as far as it was held
	Samples     *Samples          `json:"samples,omitempty"`
	Collectors  []Collector       `json:"collectors"`
	Files       []File            `json:"files"`               // the first of what was met
	FilesMore   int               `json:"filesMore,omitempty"` // how many others were met
	Archive     *Archive          `json:"archive,omitempty"`   // absent if no collector applied
	Unknown     []string          `json:"unknown,omitempty"`   // what could not be found out, and why
}

// Interface are the counters of a network interface, loopback apart.
type Interface struct {
	Name      string `json:"name"`
	RxBytes   int64  `json:"rxBytes"`
	RxPackets int64  `json:"rxPackets"`
	RxErrors  int64  `json:"rxErrors"`
	RxDropped int64  `json:"rxDropped"`
	TxBytes   int64  `json:"txBytes"`
	TxPackets int64  `json:"txPackets"`
	TxErrors  int64  `json:"txErrors"`
	TxDropped int64  `json:"txDropped"`
}

// Log is the end of a member's log.
type Log struct {
	Path  string    `json:"path"`
	Lines []LogLine `json:"lines"`
	Cut   bool      `json:"cut,omitempty"` // what is there was longer than what is kept of it
	// Dropped is how many lines are missing in the log itself: its disk was full, or
	// it has reached its maximum.
	Dropped int64 `json:"dropped,omitempty"`
}

// LogLine is one line.
type LogLine struct {
	Time   time.Time `json:"time"`
	Stream string    `json:"stream"` // stdout or stderr
	Text   string    `json:"text"`
}

// Mount is something that is mounted in a member's root. How much there is of it is
// told of what the member alone holds, and of its sandbox's /dev/shm.
type Mount struct {
	Target string `json:"target"`
	Type   string `json:"type"` // tmpfs; overlay: root with a writable layer; bind: a file or directory from elsewhere
	// From says whose it is, as sources of namespaces are written: private (the
	// member's), sandbox, host or member:NAME. Manifests of before have none.
	From   string `json:"from,omitempty"`
	Used   int64  `json:"usedBytes"`
	Size   int64  `json:"sizeBytes"` // 0: no limit of its own
	Memory bool   `json:"memory"`    // its content is in memory, and counted here
}

// Samples are what was measured while a member ran, the oldest first.
type Samples struct {
	Interval string  `json:"interval"`
	UnixMs   []int64 `json:"unixMs"`
	CPU      []int64 `json:"cpuMicros"` // used since the start
	Memory   []int64 `json:"memoryBytes"`
}

// Collector is what became of one collector.
type Collector struct {
	request.Collect
	Applied bool   `json:"applied"` // its condition was met
	Taken   int    `json:"taken"`   // entries in the archive
	Bytes   int64  `json:"bytes"`   // of their content
	Skipped int    `json:"skipped"`
	Why     string `json:"why,omitempty"` // why there is less than there could be
}

// File is what became of one file.
type File struct {
	Path  string `json:"path"`  // absolute, in the member
	Type  string `json:"type"`  // file, directory, link, fifo, socket, device
	Bytes int64  `json:"bytes"` // of content in the archive
	Taken bool   `json:"taken"`
	// LinkOf is set if it is in the archive as another name of a file that has come
	// before: that one's path.
	LinkOf string `json:"linkOf,omitempty"`
	Why    string `json:"why,omitempty"` // why not, or not as it was
}

// Archive is what became of files.tar.zst.
type Archive struct {
	Bytes   int64  `json:"bytes"` // of the file
	Entries int    `json:"entries"`
	Err     string `json:"error,omitempty"` // why there is none
}

// Bounds of a manifest.
const (
	maxLogLines    = 100
	maxLogLine     = 4 << 10
	maxLogBytes    = 64 << 10
	maxFiles       = 1000      // listed one by one
	maxFileBytes   = 512 << 10 // of what is listed; in JSON a byte can become six
	maxManifest    = 8 << 20
	maxCommand     = 8 << 10 // bytes
	maxMountPoints = 256
)

// ReadManifest reads the manifest of the collection directory dir.
func ReadManifest(dir *os.Root, name string) (*Manifest, error) {
	f, err := dir.OpenFile(path.Join(name, manifestFile), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err != nil {
		return nil, err
	}
	return ParseManifest(b)
}

// ParseManifest decodes and checks a manifest. Fields that it does not know are
// passed over: a newer version may have written them.
func ParseManifest(b []byte) (*Manifest, error) {
	if len(b) > maxManifest {
		return nil, fmt.Errorf("manifest has more than %d bytes", maxManifest)
	}
	var m Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("decode manifest: %w", err)
	}
	switch {
	case m.Version != manifestVersion:
		return nil, fmt.Errorf("manifest has version %d, and not %d", m.Version, manifestVersion)
	case m.Sandbox == "" || m.Member == "" || m.MemberID == "":
		return nil, errors.New("manifest names no member")
	}
	return &m, nil
}

// failed reports whether the member came to a bad end.
func failed(e *exit.Record) bool { return e == nil || !e.Known || e.Code != 0 }

// Applies reports whether a collector with condition w takes something after e.
func Applies(w request.When, e exit.Record) bool {
	switch w {
	case request.OnFailure:
		return failed(&e)
	case request.OnOOM:
		return e.OOMKilled
	case request.OnSignal:
		return e.Signal != 0
	}
	return true
}
