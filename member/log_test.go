package member

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/internal/crilog"
	"github.com/sandboxd/sandboxd/internal/testenv"
)

// logger is the monitor's, compiled for this machine with the sanitizers; see
// fuzz/log.c.
type logger struct {
	in  io.Writer
	out io.Reader
	err bytes.Buffer
}

func newLogger(tb testing.TB) *logger {
	tb.Helper()
	bin := filepath.Join(tb.TempDir(), "log")
	compile(tb, "-fsanitize=address,undefined", bin, "fuzz/log.c")
	cmd := exec.Command(bin)
	l := &logger{}
	cmd.Stderr = &l.err
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if l.in = in; err == nil {
		l.out, err = cmd.StdoutPipe()
	}
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			tb.Errorf("logger: %v\n%s", err, l.err.String())
		}
	})
	return l
}

// compile compiles a C program, or skips the test if this machine cannot.
func compile(tb testing.TB, sanitize, bin, src string) {
	tb.Helper()
	clang := testenv.Program(tb, "clang")
	out, err := exec.Command(clang, "-g", "-O1", "-Wno-unused-function", sanitize, "-fno-sanitize-recover=all", "-o", bin, src).CombinedOutput()
	if bytes.Contains(out, []byte("cannot find")) && bytes.Contains(out, []byte("libclang_rt")) && os.Getenv("SANDBOXD_TEST_REQUIRE") == "" {
		tb.Skip("needs clang's sanitizer libraries (Debian: libclang-rt-dev)")
	}
	if err != nil {
		tb.Fatalf("build: %v\n%s", err, out)
	}
}

// logged is what the logger has made of a request.
type logged struct {
	bytes  [2]uint64
	errors uint64
	log    []byte
}

func (l *logger) do(logMax uint32, writes []byte) (logged, error) {
	var r logged
	b := binary.NativeEndian.AppendUint32(nil, uint32(len(writes)))
	b = binary.NativeEndian.AppendUint32(b, logMax)
	if _, err := l.in.Write(append(b, writes...)); err != nil {
		return r, fmt.Errorf("%w: %s", err, l.err.String())
	}
	var n uint32
	if err := binary.Read(l.out, binary.NativeEndian, &n); err != nil {
		return r, fmt.Errorf("%w: %s", err, l.err.String())
	}
	b = make([]byte, n)
	if _, err := io.ReadFull(l.out, b); err != nil {
		return r, err
	}
	u64 := binary.NativeEndian.Uint64
	return logged{[2]uint64{u64(b), u64(b[8:])}, u64(b[16:]), b[24:]}, nil
}

// written is what the writes of a request are, by stream.
func written(writes []byte) (streams [2][]byte) {
	for len(writes) >= 3 {
		i, n := writes[0]&1, int(binary.LittleEndian.Uint16(writes[1:]))
		writes = writes[3:]
		n = min(n, len(writes))
		streams[i] = append(streams[i], writes[:n]...)
		writes = writes[n:]
	}
	return streams
}

// aWrite encodes one write.
func aWrite(stream byte, text string) []byte {
	b := binary.LittleEndian.AppendUint16([]byte{stream}, uint16(len(text)))
	return append(b, text...)
}

// FuzzLog: whatever a member writes, in pieces of whatever size, package crilog
// reads from the monitor's log.
func FuzzLog(f *testing.F) {
	l := newLogger(f)
	part := strings.Repeat("x", 16<<10)
	for _, writes := range [][][]byte{
		{aWrite(0, "out\n"), aWrite(1, "err\n")},
		{aWrite(0, "ha"), aWrite(1, "other"), aWrite(0, "lf\nrest")},
		{aWrite(0, "\n\n"), aWrite(0, ""), aWrite(0, "\x00\r\xff \n")},
		{aWrite(0, part), aWrite(1, part+"\n"), aWrite(0, "\n")},
		{aWrite(0, part+part), aWrite(1, part[1:]+"\n"), aWrite(1, part+"y")},
	} {
		f.Add(uint32(0), bytes.Join(writes, nil))
		f.Add(uint32(100), bytes.Join(writes, nil))
	}
	f.Fuzz(func(t *testing.T, logMax uint32, writes []byte) {
		got, err := l.do(logMax, writes)
		if err != nil {
			t.Fatal(err)
		}
		want := written(writes)
		if got.bytes != [2]uint64{uint64(len(want[0])), uint64(len(want[1]))} {
			t.Errorf("%d bytes are counted of %d and %d", got.bytes, len(want[0]), len(want[1]))
		}
		var read [2][]byte
		for line := range bytes.Lines(got.log) {
			whole, ok := bytes.CutSuffix(line, []byte("\n"))
			cl, err := crilog.Parse(whole)
			if !ok || err != nil {
				t.Fatalf("line %.100q: %v", line, err)
			}
			if again, err := crilog.Parse(bytes.TrimSuffix(crilog.Format(cl), []byte("\n"))); err != nil || !again.Time.Equal(cl.Time) || !bytes.Equal(again.Content, cl.Content) {
				t.Errorf("line %.100q is written again as %.100q, %v", whole, crilog.Format(cl), err)
			}
			i := 0
			if cl.Stream == "stderr" {
				i = 1
			}
			read[i] = append(read[i], cl.Content...)
			if !cl.Partial {
				read[i] = append(read[i], '\n')
			} else if len(cl.Content) != len(part) {
				t.Errorf("a part has %d bytes", len(cl.Content))
			}
		}
		if logMax > 0 && len(got.log) > int(logMax) {
			t.Errorf("the log has %d bytes, at most %d are allowed", len(got.log), logMax)
		}
		if got.errors > 0 && logMax > 0 {
			return // something is missing
		}
		for i, w := range want {
			if len(w) > 0 && w[len(w)-1] != '\n' {
				w = append(w, '\n') // the last line is whole for its readers
			}
			if !bytes.Equal(read[i], w) || got.errors > 0 {
				t.Errorf("stream %d: %.100q (%d bytes) is read of %.100q (%d bytes); %d errors", i+1, read[i], len(read[i]), w, len(w), got.errors)
			}
		}
	})
}
