package launch

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/testenv"
)

func TestStartRunsToTheExec(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var p Program
	d := p.Call("open /", unix.SYS_OPENAT, Int(unix.AT_FDCWD), p.String("/"), Int(unix.O_PATH|unix.O_DIRECTORY))
	p.Call("change to /", unix.SYS_FCHDIR, d.Result())
	p.Fork("fork", 0, nil)
	p.Call("open what is not there", unix.SYS_OPENAT, Int(unix.AT_FDCWD), p.String("/nowhere"), Int(0)).Then(func() {
		p.Call("fail", unix.SYS_OPENAT, Int(-1), Int(0))
	}, unix.ENOENT)
	p.Created()
	p.Exec([]string{"/nowhere/sh", "/bin/sh"}, []string{"sh", "-c", "echo $X; pwd; exit 7"}, []string{"X=hello"})
	created := 0
	proc, err := Start(&p, Options{Stdout: w, Created: func(pid int) error { created = pid; return nil }})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	st, _, err := proc.Wait()
	if err != nil || !st.Exited() || st.ExitStatus() != 7 {
		t.Errorf("Wait = %v, %v, want exit 7", st, err)
	}
	if created != proc.PID {
		t.Errorf("Created was called with %d, want %d", created, proc.PID)
	}
	buf := make([]byte, 100)
	n, _ := r.Read(buf)
	if got := string(buf[:n]); got != "hello\n/\n" {
		t.Errorf("output %q", got)
	}
}

func TestStartNamesTheStepThatFailed(t *testing.T) {
	var p Program
	p.Call("open the moon", unix.SYS_OPENAT, Int(unix.AT_FDCWD), p.String("/moon"), Int(0))
	p.Exec([]string{"/bin/true"}, []string{"true"}, nil)
	_, err := Start(&p, Options{})
	var se *StepError
	if !errors.As(err, &se) || se.Exec || err.Error() != "open the moon: no such file or directory" {
		t.Errorf("Start = %v", err)
	}
	if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child is left: %v", err)
	}
}

// TestStartReapsASiblingThatFails: nobody waits in the program, so the sibling's
// failure may be reported before its pid.
func TestStartReapsASiblingThatFails(t *testing.T) {
	for range 30 {
		var p Program
		p.Fork("fork", 0, nil)
		p.Call("open the moon", unix.SYS_OPENAT, Int(unix.AT_FDCWD), p.String("/moon"), Int(0))
		p.Exec([]string{"/bin/true"}, []string{"true"}, nil)
		if _, err := Start(&p, Options{}); err == nil || err.Error() != "open the moon: no such file or directory" {
			t.Fatalf("Start = %v", err)
		}
		if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
			t.Fatalf("a child is left: %v", err)
		}
	}
}

// TestOtherArchitecture runs the arm64 launcher in emulation on a program with
// arm64's numbers.
func TestOtherArchitecture(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the other one is emulated on amd64")
	}
	qemu := testenv.Program(t, "qemu-aarch64-static")
	const openat, fchdir, write = 56, 50, 64 // include/uapi/asm-generic/unistd.h
	var p Program
	d := p.Call("open /", openat, Int(unix.AT_FDCWD), p.String("/"), Int(unix.O_RDONLY))
	p.Call("change to /", fchdir, d.Result())
	p.Call("open what is not there", openat, Int(unix.AT_FDCWD), p.String("/nowhere"), Int(0)).Then(func() {
		p.Call("write what is not to be written", write, Int(1), p.String("wrong"), Int(5))
	}, unix.ENOENT)
	p.Call("write", write, Int(1), p.String("hello"), Int(5))
	p.Call("open the moon", openat, Int(unix.AT_FDCWD), p.String("/moon"), Int(0))
	program, err := p.Memfd(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	cmd := exec.Command(qemu, "-0", "sandboxd-launch", "launch_arm64.elf", "mark")
	cmd.ExtraFiles = []*os.File{w, nil, program}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); cmd.ProcessState.ExitCode() != 125 {
		t.Errorf("launch: %v, want exit code 125; %s", err, stderr.String())
	}
	if stdout.String() != "hello" {
		t.Errorf("output %q", stdout.String())
	}
	w.Close()
	kind, op, errno, err := ReadReport(r)
	if err != nil || kind != ReportFailed || p.Step(int(op)) != "open the moon" || unix.Errno(errno) != unix.ENOENT {
		t.Errorf("report %d of step %q, %v, %v", kind, p.Step(int(op)), unix.Errno(errno), err)
	}
}
