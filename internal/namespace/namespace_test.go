package namespace

import (
	"os"
	"testing"
)

func TestSupportedAsksOnce(t *testing.T) {
	for _, k := range Kinds() {
		_, err := os.Lstat("/proc/self/ns/" + string(k))
		if got := k.Supported(); got != (err == nil) {
			t.Errorf("%s: Supported = %v, but %v", k, got, err)
		}
	}
	if Kind("net ").Supported() {
		t.Error("what is no kind is supported")
	}
	// A call of the kernel with a name takes memory for that.
	if n := testing.AllocsPerRun(10, func() { Net.Supported() }); n != 0 {
		t.Errorf("Supported takes memory %v times", n)
	}
}
