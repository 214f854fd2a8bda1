//go:build e2e

package e2e

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
)

// keys are the keys of an object and of those in it, as "a.b", sorted.
func keys(prefix string, v any) []string {
	var out []string
	if o, ok := v.(object); ok {
		for _, k := range slices.Sorted(maps.Keys(o)) {
			name := strings.TrimPrefix(prefix+"."+k, ".")
			out = append(append(out, name), keys(name, o[k])...)
		}
	}
	return out
}

func TestStoryShape(t *testing.T) {
	s := newStory(t)
	s.startMember("m", "exit 3")
	s.exited("m")
	var sandbox, member object
	var list, members []object
	for args, into := range map[string]any{"inspect web": &sandbox, "inspect web/m": &member, "ls -o json": &list, "ps -o json": &members} {
		if err := json.Unmarshal([]byte(s.ok(strings.Fields(args)...)), into); err != nil {
			t.Fatalf("%s: %v", args, err)
		}
	}
	// Other programs read these: a key may be added, none may go.
	for what, want := range map[string]string{
		"sandbox": "id name state createdAt pausePid hostname network network.mode namespaces.net.inode namespaces.net.path labels annotations cgroup members",
		"member": "id name state pid createdAt startedAt namespaces.mnt.source namespaces.mnt.inode namespaces.mnt.path root logPath cgroup custody.held custody.since " +
			"limits.memory limits.nanoCpus limits.pids mounts env exit.known exit.code exit.signal exit.oomKilled exit.finishedAt exit.reason exit.rusage.userMicros exit.rusage.systemMicros exit.rusage.maxRssKiB",
	} {
		got := keys("", map[string]object{"sandbox": sandbox, "member": member}[what])
		for _, k := range strings.Fields(want) {
			if !slices.Contains(got, k) {
				t.Errorf("%s lacks %s: %v", what, k, got)
			}
		}
	}
	// Lists leave out what sandboxes and members were made with.
	delete(sandbox, "shmSize")
	for _, m := range []object{member, sandbox["members"].([]any)[0].(object)} {
		for _, k := range []string{"limits", "mounts", "env"} {
			delete(m, k)
		}
	}
	if len(list) != 1 || !slices.Equal(keys("", list[0]), keys("", sandbox)) || len(members) != 1 || !slices.Equal(keys("", members[0]), keys("", member)) {
		t.Errorf("ls and ps have other objects than inspect: %v, %v", list, members)
	}
	id := s.sandboxID()
	for _, ref := range []string{"web", id, id[:6]} {
		s.contains("inspect "+ref, s.ok("inspect", ref), id)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		s.contains("completion for "+shell, s.ok("completion", shell), "sandboxd")
	}
	complete := func(args ...string) string { return s.ok(append([]string{"__complete"}, args...)...) }
	s.contains("completion of names", complete("join", "w"), "web\tReady\n", "web/m\tExited\n")
	s.contains("completion of flags", complete("run", "web", "--cu"), "--custody\t", "--custody-ttl\t")
	for _, c := range []struct {
		args []string
		want string // the whole
	}{
		{[]string{"run", ""}, "web\tReady\n:4\n"},
		{[]string{"logs", ""}, "web/m\tExited\n:4\n"},
		{[]string{"exec", ""}, ":4\n"},  // none is running,
		{[]string{"start", ""}, ":4\n"}, // and none is still to be started
		{[]string{"cp", ""}, "web/m:\n:2\n"},
		{[]string{"kill", "web/m", "T"}, "HUP\nINT\nKILL\nQUIT\nTERM\nUSR1\nUSR2\n:4\n"},
		{[]string{"run", "--custody", ""}, "always\nfailure\nnever\n:4\n"},
		{[]string{"create", "--share", "net,"}, "net,ipc\nnet,uts\nnet,pid\nnet,user\nnet,cgroup\nnet,time\n:6\n"},
		{[]string{"ls", "-o", ""}, "json\ntable\n:4\n"},
		{[]string{"run", "web", "--rootfs", ""}, ":16\n"},
		{[]string{"create", "--mac"}, "--mac\tMAC address of its own choice\n:4\n"},
	} {
		if got := complete(c.args...); got != strings.TrimSpace(c.want) && got != c.want {
			t.Errorf("completion of %q is %q, want %q", c.args, got, c.want)
		}
	}
	s.contains("completion of namespaces", complete("join", "web", "--ns", "net=host,"), "net=host,pid=private\n", "net=host,mnt=member:\n")
	s.contains("completion of capabilities", complete("run", "--cap-add", "NET_"), "NET_ADMIN\n", "ALL\n")
}
