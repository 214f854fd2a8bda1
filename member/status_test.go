package member

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/exit"
	"github.com/sandboxd/sandboxd/internal/launch"
	"github.com/sandboxd/sandboxd/internal/procid"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestReadExit(t *testing.T) {
	at := time.Unix(1, 5).UTC()
	tests := []struct {
		name, json string
		flags      uint32
		want       exit.Record
	}{
		{"code", `"known":true,"waitStatus":768,"oomKills":0`, 0, exit.Record{Known: true, Code: 3, Reason: "Error"}},
		{"killed for memory", `"known":true,"waitStatus":9,"oomKills":1`, 0, exit.Record{Known: true, Code: 137, Signal: 9, OOMKilled: true, Reason: "OOMKilled"}},
		{"a child killed for memory", `"known":true,"waitStatus":0,"oomKills":1`, 0, exit.Record{Known: true, OOMKilled: true, Reason: "Completed"}},
		{"unknown", `"known":false,"waitStatus":0,"oomKills":0,"why":"because"`, 0, exit.Record{Code: -1, Reason: "Unknown: because"}},
		{"execve failed", `"known":true,"waitStatus":32512,"oomKills":0`, statusExecFailed, exit.Record{Known: true, Code: 127, Reason: "StartError: no such file or directory"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			writeFile(t, dir, statusName, statusPage(PhaseExited, tt.flags))
			writeFile(t, dir, exitName, []byte(`{"version":1,"finishedAtNs":1000000005,`+tt.json+`}`))
			got, err := ReadExit(dir)
			tt.want.FinishedAt = at
			if err != nil || *got != tt.want {
				t.Errorf("ReadExit = %+v, %v, want %+v", got, err, tt.want)
			}
		})
	}
}

// What stands in the place of a monitor's file must not block whoever reads it.
func TestReadWhatIsNoFile(t *testing.T) {
	for _, name := range []string{statusName, exitName} {
		for _, tt := range []struct {
			what string
			put  func(path string) error
		}{
			{"FIFO", func(path string) error { return unix.Mkfifo(path, 0o600) }},
			{"directory", func(path string) error { return os.Mkdir(path, 0o700) }},
			{"device", func(path string) error { return os.Symlink("/dev/zero", path) }},
		} {
			t.Run(tt.what+" as "+name, func(t *testing.T) {
				dir := t.TempDir()
				writeFile(t, dir, statusName, statusPage(PhaseExited, 0))
				os.Remove(filepath.Join(dir, name))
				if err := tt.put(filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() {
					_, err := ReadExit(dir)
					done <- err
				}()
				select {
				case err := <-done:
					if err == nil || !strings.Contains(err.Error(), name+" is not a regular file") {
						t.Errorf("ReadExit = %v", err)
					}
				case <-time.After(5 * time.Second):
					t.Fatal("ReadExit is blocked")
				}
			})
		}
	}
}

func TestReadExitWithoutRecord(t *testing.T) {
	dir := t.TempDir()
	if r, err := ReadExit(dir); r != nil || err != nil {
		t.Errorf("ReadExit of an empty directory = %v, %v", r, err)
	}
	writeFile(t, dir, statusName, statusPage(PhaseRunning, 0))
	if r, err := ReadExit(dir); r != nil || err != nil {
		t.Errorf("ReadExit of a running member = %v, %v", r, err)
	}
	writeFile(t, dir, statusName, statusPage(PhaseExited, 0)) // wait status 0x100, and no room for exit.json
	if r, err := ReadExit(dir); err != nil || r.Code != 1 {
		t.Errorf("ReadExit by the status page = %+v, %v", r, err)
	}
}

func TestParseRecordRefuses(t *testing.T) {
	for _, s := range []string{
		``, `{}`, `null`, `{"version":2,"known":true}`, `{"version":1,"known":true} x`, `{"version":1,"known":true,"more":1}`,
		`{"version":1,"known":true,"waitStatus":127}`, `{"version":1,"known":false}`, `{"version":1,"known":true,"why":"x"}`,
		`{"version":1,"known":true,"waitStatus":-1}`,
	} {
		if r, err := parseRecord([]byte(s)); err == nil {
			t.Errorf("parseRecord(%s) = %+v, want an error", s, r)
		}
	}
}

func TestWriteExitReplacesNothing(t *testing.T) {
	dir := t.TempDir()
	ru := &unix.Rusage{Utime: unix.Timeval{Sec: 1, Usec: 2}, Stime: unix.Timeval{Usec: 3}, Maxrss: 4}
	for _, st := range []unix.WaitStatus{5 << 8, 6 << 8} {
		if err := WriteExit(dir, st, 0, ru); err != nil {
			t.Fatal(err)
		}
	}
	r, err := ReadExit(dir)
	if err != nil || r.Code != 5 || r.Rusage != (exit.Rusage{UserMicros: 1000002, SystemMicros: 3, MaxRSSKiB: 4}) {
		t.Errorf("ReadExit = %+v, %v, want the first", r, err)
	}
	if es, err := os.ReadDir(dir); err != nil || len(es) != 1 {
		t.Errorf("directory has %v, %v, want the record alone", es, err)
	}
}

func TestParseStatusRefuses(t *testing.T) {
	page := statusPage(PhaseRunning, 0)
	for name, b := range map[string][]byte{
		"short":       page[:statusSize-1],
		"long":        append(slices.Clone(page), 0),
		"magic":       append([]byte{1}, page[1:]...),
		"other phase": statusPage(5, 0),
	} {
		if s, err := parseStatus(b); err == nil {
			t.Errorf("%s: parseStatus = %+v, want an error", name, s)
		}
	}
	if s, err := parseStatus(make([]byte, statusSize)); err != nil || s != (Status{}) {
		t.Errorf("parseStatus of a page that is not filled = %+v, %v", s, err)
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"known":true,"waitStatus":768,"oomKills":0,"finishedAtNs":1,"userMicros":1,"systemMicros":1,"maxRssKiB":1,"why":""}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parseRecord(b)
		if err != nil {
			return
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		if r2, err := parseRecord(again); err != nil || r2 != r {
			t.Errorf("%+v is read back as %+v, %v", r, r2, err)
		}
		e := r.exit(Status{})
		if e.Known != (e.Code >= 0) || e.Reason == "" || e.Code > 255 {
			t.Errorf("exit = %+v", e)
		}
	})
}

func FuzzParseStatus(f *testing.F) {
	f.Add(statusPage(PhaseExited, 7))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStatus(b); err == nil && (s.Phase > PhaseFailed || s.Init.PID < 0) {
			t.Errorf("parseStatus = %+v", s)
		}
	})
}

// TestDecodersInC runs a fuzzer, for a short while, over what the C programs
// check: it finds a read or write outside the buffer.
func TestDecodersInC(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "fuzz")
	compile(t, "-fsanitize=fuzzer,address,undefined", bin, "fuzz/fuzz.c")
	seeds := t.TempDir()
	p := &launch.Program{}
	p.Created()
	p.Exec([]string{"/a", "/b"}, []string{"a", "b"}, []string{"c=d"})
	prog, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	spec := MonitorSpec{LogPath: "/log"}
	config, err := spec.config(0, procid.ID{}, len(prog))
	if err != nil {
		t.Fatal(err)
	}
	adopt, err := spec.config(configAdopt, procid.ID{PID: 7, Start: 8}, 0)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, seeds, "program", prog)
	writeFile(t, seeds, "config", slices.Concat(config, prog))
	writeFile(t, seeds, "adopt", adopt)
	cmd := exec.Command(bin, "-max_total_time=5", "-max_len=4096", "-print_final_stats=1", seeds)
	cmd.Dir = t.TempDir()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("fuzz: %v\n%s", err, out)
	} else if i := bytes.Index(out, []byte("stat::number_of_executed_units")); i >= 0 {
		t.Logf("%s", bytes.SplitN(out[i:], []byte("\n"), 2)[0])
	}
}

// TestMonitorOfTheOtherMachine runs the arm64 program in emulation as far as it
// goes there: it maps its status page, checks its configuration, and says what
// is wrong with it.
func TestMonitorOfTheOtherMachine(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the other machine is arm64")
	}
	qemu := testenv.Program(t, "qemu-aarch64-static")
	dir := t.TempDir()
	writeFile(t, dir, statusName, make([]byte, statusSize))
	status, err := os.OpenFile(filepath.Join(dir, statusName), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer status.Close()
	spec := MonitorSpec{LogPath: "/log"}
	config, err := spec.config(0, procid.ID{}, 100) // a program is promised and is not there
	if err != nil {
		t.Fatal(err)
	}
	conf, err := configFile(config)
	if err != nil {
		t.Fatal(err)
	}
	defer conf.Close()
	cmd := exec.Command(qemu, "-0", "sandboxd-monitor", "monitor_arm64.elf", "mark")
	cmd.ExtraFiles = []*os.File{conf, status}
	out, err := cmd.CombinedOutput()
	var ee *exec.ExitError
	if !errors.As(err, &ee) || ee.ExitCode() != 1 {
		t.Errorf("monitor: %v, want exit code 1\n%s", err, out)
	}
	st, err := ReadStatus(dir)
	if err != nil || st.Phase != PhaseFailed || st.FailOp != failConfig || st.FailErrno != unix.EINVAL || st.FinishedAt.IsZero() {
		t.Errorf("status = %+v, %v", st, err)
	}
}

func TestExplainFailure(t *testing.T) {
	spec := &MonitorSpec{LogPath: "/l"}
	tests := []struct {
		st   Status
		want string
	}{
		{Status{Phase: PhaseFailed, FailOp: failKilled, WaitStatus: 9, OOMKills: 1}, "memory limit is below what init needs to start"},
		{Status{Phase: PhaseFailed, FailOp: failKilled, WaitStatus: 3 << 8}, "init exited with 3"},
		{Status{Phase: PhaseFailed, FailOp: failLog, FailErrno: unix.EROFS}, "open log /l: read-only file system"},
		{Status{Phase: PhaseNone}, "monitor ended in phase none"},
	}
	for _, tt := range tests {
		if err := explainFailure(tt.st, &launch.Program{}, spec); !strings.Contains(err.Error(), tt.want) {
			t.Errorf("explainFailure(%+v) = %v, want %s", tt.st, err, tt.want)
		}
	}
}

func statusPage(phase Phase, flags uint32) []byte {
	b := make([]byte, statusSize)
	le := binary.LittleEndian
	for at, n := range map[int]uint32{0: statusMagic, 4: statusVersion, 8: uint32(phase), 12: flags, 16: 10, 20: 11, 60: uint32(unix.ENOENT), 64: 1 << 8} {
		le.PutUint32(b[at:], n)
	}
	return b
}

func writeFile(t *testing.T, dir, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
		t.Fatal(fmt.Errorf("write %s: %w", name, err))
	}
}
