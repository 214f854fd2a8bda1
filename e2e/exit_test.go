//go:build e2e

package e2e

import (
	endian "encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// known fails the test unless the record is known and says code, signal and
// whether memory was the reason.
func (r *rig) known(ref string, code, signal int, oom bool) {
	r.Helper()
	e := r.exited(ref)
	if !e.Known || e.Code != code || e.Signal != signal || e.OOMKilled != oom || e.FinishedAt.IsZero() {
		r.Errorf("%s has exited with %+v; want code %d, signal %d, oomKilled %v", ref, e, code, signal, oom)
	}
}

func TestExitRecords(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "box")
	for i, tt := range []struct {
		script       string
		signal       unix.Signal // sent to init from outside; 0: none
		code, sig    int
		memory       string
		oom          bool
		reasonPrefix string
	}{
		{script: "exit 0", reasonPrefix: "Completed"},
		{script: "exit 255", code: 255, reasonPrefix: "Error"},
		{script: "sleep 1000", signal: unix.SIGKILL, code: 137, sig: 9, reasonPrefix: "Signal"},
		// pid 1 of a pid namespace is not ended by signals from inside that it
		// does not catch, so a child of it is the program of these.
		{script: `trap "exit 3" TERM; while :; do sleep 0.01; done`, signal: unix.SIGTERM, code: 3, reasonPrefix: "Error"},
		{script: "exec tail /dev/zero", memory: "16m", code: 137, sig: 9, oom: true, reasonPrefix: "OOMKilled"},
		{script: "tail /dev/zero; exit 4", memory: "16m", code: 4, oom: true},
	} {
		name := fmt.Sprintf("m%d", i)
		flags := []string{}
		if tt.memory != "" {
			flags = append(flags, "--memory", tt.memory)
		}
		r.run("box", name, tt.script, flags...)
		ref := "box/" + name
		if tt.signal != 0 {
			pid := r.member(ref).PID
			if strings.HasPrefix(tt.script, "trap") {
				r.catches(pid, tt.signal)
			}
			r.sig(pid, tt.signal)
		}
		r.known(ref, tt.code, tt.sig, tt.oom)
		if e := r.exited(ref); !strings.HasPrefix(e.Reason, tt.reasonPrefix) {
			r.Errorf("%s: reason %q, want %q", tt.script, e.Reason, tt.reasonPrefix)
		}
	}
	r.ok("rm", "-f", "box")
}

// A program that is ended by a signal of its own making or of others', without
// a pid namespace that would protect it.
func TestExitBySignal(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "box")
	for _, tt := range []struct {
		name   string
		signal unix.Signal
	}{{"segv", unix.SIGSEGV}, {"term", unix.SIGTERM}, {"abrt", unix.SIGABRT}, {"rt", unix.Signal(40)}} {
		r.run("box", tt.name, fmt.Sprintf("kill -%d $$", tt.signal), "--ns", "pid=host")
		r.known("box/"+tt.name, 128+int(tt.signal), int(tt.signal), false)
	}
	r.ok("rm", "-f", "box")
}

// TestExitByFault runs a program that does what it must not, as pid 1 of its pid
// namespace: the kernel forces this signal on it.
func TestExitByFault(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	path := t.TempDir() + "/fault"
	if err := os.WriteFile(path, faultELF(), 0o755); err != nil {
		t.Fatal(err)
	}
	r.mustServe()
	r.ok("create", "box")
	r.ok("run", "box", "--rootfs", r.rootfs, "--name", "m", "-d", "-v", path+":/fault", "--", "/fault")
	r.known("box/m", 139, int(unix.SIGSEGV), false)
	r.ok("rm", "-f", "box")
}

// faultELF is the smallest program that writes to address 0 (elf(5)).
func faultELF() []byte {
	const base, headers = 0x400000, 64 + 56
	machine, code := uint16(62), []byte{0x31, 0xc0, 0x89, 0x00} // xor eax, eax; mov [rax], eax
	if runtime.GOARCH == "arm64" {
		machine, code = 183, []byte{0, 0, 0x80, 0xd2, 0, 0, 0, 0xf9} // mov x0, 0; str x0, [x0]
	}
	le := endian.LittleEndian
	b := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00") // 64 bits, little endian
	b = le.AppendUint16(b, 2)                                              // executable
	b = le.AppendUint16(b, machine)
	b = le.AppendUint32(b, 1)
	b = le.AppendUint64(b, base+headers) // entry
	b = le.AppendUint64(b, 64)           // program headers
	b = le.AppendUint64(b, 0)
	b = le.AppendUint32(b, 0)
	for _, n := range []uint16{64, 56, 1, 64, 0, 0} {
		b = le.AppendUint16(b, n)
	}
	b = le.AppendUint32(b, 1) // load
	b = le.AppendUint32(b, 5) // readable, executable
	size := uint64(headers + len(code))
	for _, n := range []uint64{0, base, base, size, size, 0x1000} {
		b = le.AppendUint64(b, n)
	}
	return append(b, code...)
}

// TestOOMAfterMonitorWasKilled: who takes over counts the kills for memory too.
func TestOOMAfterMonitorWasKilled(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "box")
	r.run("box", "m", `trap "exec tail /dev/zero" TERM; while :; do sleep 0.01; done`, "--memory", "16m")
	m := r.member("box/m")
	r.catches(m.PID, unix.SIGTERM)
	r.sig(m.MonitorPID, unix.SIGKILL)
	r.eventually("the monitor is replaced", func() bool {
		now := r.member("box/m")
		return now.MonitorPID != 0 && now.MonitorPID != m.MonitorPID
	})
	r.sig(m.PID, unix.SIGTERM)
	r.known("box/m", 137, 9, true)
	r.ok("rm", "-f", "box")
}

// TestExitWithoutDaemon ends members at every time at which the daemon may be
// absent.
func TestExitWithoutDaemon(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"daemon back after it", "daemon back before it", "daemon killed with it"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.mustServe()
			r.ok("create", "box")
			r.run("box", "m", `trap "exit 5" TERM; echo up; while :; do sleep 0.01; done`)
			pid := r.member("box/m").PID
			r.catches(pid, unix.SIGTERM)
			switch how {
			case "daemon back after it":
				r.kill()
				r.sig(pid, unix.SIGTERM)
				r.gone(pid)
				r.known("box/m", 5, 0, false) // from the state directory
				r.mustServe()
			case "daemon back before it":
				r.kill()
				r.mustServe()
				r.sig(pid, unix.SIGTERM)
			case "daemon killed with it":
				r.sig(pid, unix.SIGTERM)
				r.kill()
				r.mustServe()
			}
			r.known("box/m", 5, 0, false)
			if got := r.logOf("box/m"); got != "up" {
				r.Errorf("log %q", got)
			}
			r.ok("rm", "box/m")
			r.ok("rm", "box")
		})
	}
}

// numbers is a member that writes numbers as fast as it is asked to, and ends
// with code 6 when told. Its log must hold all that was written after a monitor
// has been replaced.
const numbers = `trap "exit 6" TERM; n=0; while :; do n=$((n+1)); echo $n; sleep 0.001; done`

// TestMonitorKilled kills the monitor of a running member.
func TestMonitorKilled(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"daemon alive", "daemon dead", "daemon dead, exit before it is back", "daemon dead with it", "replaced and the daemon killed before it knew"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.mustServe()
			r.ok("create", "box")
			r.run("box", "m", numbers)
			m := r.member("box/m")
			r.catches(m.PID, unix.SIGTERM)
			killMonitor := func() {
				r.sig(m.MonitorPID, unix.SIGKILL)
				r.gone(m.MonitorPID)
			}
			replaced := func() {
				r.eventually("the monitor is replaced", func() bool {
					now := r.member("box/m")
					return now.MonitorPID != 0 && now.MonitorPID != m.MonitorPID
				})
			}
			switch how {
			case "daemon alive":
				killMonitor()
				replaced()
			case "daemon dead":
				r.kill()
				killMonitor()
				r.mustServe()
				replaced()
			case "daemon dead with it":
				killMonitor()
				r.kill()
				r.mustServe()
				replaced()
			case "replaced and the daemon killed before it knew":
				r.kill()
				killMonitor()
				if r.serve("SANDBOXD_CRASH_AT=monitor replace after") {
					r.d.waitExit(r.T)
				}
				r.sig(m.PID, unix.SIGTERM)
				r.gone(m.PID)
				r.eventually("the new monitor has recorded the exit", func() bool {
					_, err := os.Stat(filepath.Join(r.d.state, "sandboxes", m.Sandbox, "m", m.ID, "exit.json"))
					return err == nil
				})
				r.mustServe()
			case "daemon dead, exit before it is back":
				r.kill()
				killMonitor()
				r.sig(m.PID, unix.SIGTERM)
				r.eventually("init is reaped by the host's", func() bool {
					_, err := os.Stat(fmt.Sprintf("/proc/%d", m.PID))
					return err != nil
				})
				r.mustServe()
				if e := r.exited("box/m"); e.Known || e.Reason == "" {
					r.Errorf("exit %+v; nobody can know it", e)
				}
				r.ok("rm", "-f", "box")
				return
			}
			if how != "replaced and the daemon killed before it knew" {
				if pid := r.member("box/m").PID; pid != m.PID {
					r.Errorf("init was %d and is %d", m.PID, pid)
				}
				before := len(r.logOf("box/m"))
				r.eventually("the log goes on", func() bool { return len(r.logOf("box/m")) > before })
				r.sig(m.PID, unix.SIGTERM)
			}
			r.known("box/m", 6, 0, false)
			r.sequence("box/m")
			held := r.member("box/m")
			if !held.Custody.Held {
				r.Error("custody is not held")
			}
			r.ok("rm", "box/m")
			if pidRuns(held.MonitorPID) {
				r.Error("the monitor goes on after the member was removed")
			}
			r.ok("rm", "box")
		})
	}
}

// sequence checks that numbers has lost no line that was written after its
// monitor was replaced: a killed monitor may take what it has read and not
// written yet with it, but nothing else may be missing, and nothing comes twice.
func (r *rig) sequence(ref string) {
	r.Helper()
	last, gaps := 0, 0
	for line := range strings.Lines(r.logOf(ref)) {
		var n int
		if _, err := fmt.Sscan(line, &n); err != nil || n <= last {
			r.Fatalf("after line %d of the log comes %q", last, line)
		}
		if n != last+1 {
			gaps++
		}
		last = n
	}
	if gaps > 1 {
		r.Errorf("the log has %d gaps in %d lines", gaps, last)
	}
}

// TestMonitorOfCreatedKilled starts a member whose monitor was killed before.
func TestMonitorOfCreatedKilled(t *testing.T) {
	t.Parallel()
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart %v", restart), func(t *testing.T) {
			t.Parallel()
			r := newRig(t)
			r.mustServe()
			r.ok("create", "box")
			r.ok("add", "box", "--rootfs", r.rootfs, "--name", "m", "--", "sh", "-c", "echo started; exit 8")
			m := r.member("box/m")
			if restart {
				r.kill()
			}
			r.sig(m.MonitorPID, unix.SIGKILL)
			r.gone(m.MonitorPID)
			if restart {
				r.mustServe()
			}
			r.eventually("the monitor is replaced", func() bool {
				now := r.member("box/m")
				return now.MonitorPID != 0 && now.MonitorPID != m.MonitorPID
			})
			if now := r.member("box/m"); now.PID != m.PID || now.State != "Created" {
				r.Errorf("init %d is %s, was %d and Created", now.PID, now.State, m.PID)
			}
			r.ok("start", "box/m")
			r.known("box/m", 8, 0, false)
			if got := r.logOf("box/m"); got != "started" {
				r.Errorf("log %q", got)
			}
			r.ok("rm", "-f", "box")
		})
	}
}

// TestMonitorStopped: a monitor that does not answer keeps neither the daemon from
// starting nor others from being used, and is found again when it goes on.
func TestMonitorStopped(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.mustServe()
	r.ok("create", "s")
	r.ok(long(r, "run", "s", "m")...)
	r.ok("create", "other")
	m := r.member("s/m")
	r.sig(m.MonitorPID, unix.SIGSTOP)
	r.kill()
	r.mustServe()
	r.run("other", "quick", "exit 7")
	r.known("other/quick", 7, 0, false)
	if got := r.member("s/m"); got.State != "Running" || got.PID != m.PID {
		r.Errorf("the member is %+v", got)
	}
	r.sig(m.MonitorPID, unix.SIGCONT)
	r.ok("kill", "s/m", "KILL")
	r.known("s/m", 137, 9, false)
	// It is made to go on when there is an exit to record.
	r.ok(long(r, "run", "s", "n")...)
	r.sig(r.member("s/n").MonitorPID, unix.SIGSTOP)
	r.ok("stop", "--time", "0", "s/n")
	r.known("s/n", 137, 9, false)
	r.ok("rm", "other")
	r.ok("rm", "s")
}
