package member

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/internal/namespace"
	"github.com/sandboxd/sandboxd/internal/request"
)

// facts is a sandbox as it is by default, with three members: web runs, dead is in
// custody, and gone is not; shares passes on what web and the sandbox have.
func facts() *SandboxFacts {
	sel := func(s string) namespace.Selection {
		sel, err := namespace.ParseSelection(s)
		if err != nil {
			panic(err)
		}
		return sel
	}
	own := "net=sandbox,ipc=sandbox,uts=sandbox,user=host,time=host,pid=private,mnt=private,cgroup=private"
	return &SandboxFacts{
		Hostname:  "pod",
		Holds:     []namespace.Kind{namespace.Net, namespace.IPC, namespace.UTS},
		ShmShared: true,
		Members: []SiblingFacts{
			{Name: "web", ID: "1111111111111111", Alive: true, Held: true, PidNSAlive: true, Root: "/", Namespaces: sel(own)},
			{Name: "dead", ID: "2222222222222222", Held: true, Root: "/", Namespaces: sel(own)},
			{Name: "gone", ID: "3333333333333333", Namespaces: sel(own)},
			{Name: "shares", ID: "4444444444444444", Alive: true, Held: true, PidNSAlive: true, Root: "/", Namespaces: sel("all=member:web,time=host")},
			{Name: "ring", ID: "5555555555555555", Alive: true, Held: true, Namespaces: sel("net=member:gnir")},
			{Name: "gnir", ID: "6666666666666666", Alive: true, Held: true, Namespaces: sel("net=member:ring")},
		},
	}
}

// rootfs makes a root with these users.
func rootfs(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	write(t, filepath.Join(root, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n# comment\nbroken:line\nbob:x:1000:100::/home/bob:/bin/sh\nnasty:x:99999999999:1::/:\n1234:x:7:8::/seven:\nnohome:x:9:9:::\n")
	write(t, filepath.Join(root, "etc/group"), "root:x:0:\nusers:x:100:\nwheel:x:10:alice,bob\naudio:x:29:bob\nagain:x:10:bob\n")
	return root
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// check reports whether err has want in its one line; "" stands for success.
func check(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case err == nil && want != "":
		t.Errorf("no error, want %q", want)
	case err != nil && (want == "" || !strings.Contains(err.Error(), want)):
		t.Errorf("error %q, want %q", err, want)
	case err != nil && strings.ContainsAny(err.Error(), "\n\x00"):
		t.Errorf("error %q is not one line", err)
	}
}

func TestResolveErrors(t *testing.T) {
	root := rootfs(t)
	file := filepath.Join(root, "etc/passwd")
	ns := func(s string) func(*request.Member) {
		return func(m *request.Member) {
			sel, err := namespace.ParseSelection(s)
			if err != nil {
				t.Fatal(err)
			}
			m.Namespaces = sel
		}
	}
	shared := func(s string, f func(*request.Member)) func(*request.Member) {
		return func(m *request.Member) {
			ns(s)(m)
			m.Rootfs = ""
			f(m)
		}
	}
	nop := func(*request.Member) {}
	vol := func(v ...request.Volume) func(*request.Member) {
		return func(m *request.Member) { m.Volumes = v }
	}
	tmp := func(v ...request.Tmpfs) func(*request.Member) {
		return func(m *request.Member) { m.Tmpfs = v }
	}
	tests := []struct {
		name string
		mod  func(*request.Member)
		want string
	}{
		{"plain", nop, ""},
		{"no root", func(m *request.Member) { m.Rootfs = "" }, "no root"},
		{"two roots", func(m *request.Member) { m.Bundle = root }, "rootfs and bundle exclude each other"},
		{"rootfs missing", func(m *request.Member) { m.Rootfs = "/nonexistent" }, "rootfs: /nonexistent: no such file"},
		{"rootfs is a file", func(m *request.Member) { m.Rootfs = file }, "passwd is not a directory"},
		{"rootfs relative", func(m *request.Member) { m.Rootfs = "x" }, `rootfs "x" is not an absolute path`},
		{"rootfs with newline", func(m *request.Member) { m.Rootfs = "/a\nb" }, `rootfs "/a\nb" contains a control character`},
		{"rootfs too long", func(m *request.Member) { m.Rootfs = "/" + strings.Repeat("a", 5000) }, "a path has at most 4095"},
		{"bundle missing", func(m *request.Member) { m.Rootfs, m.Bundle = "", "/nonexistent" }, "/nonexistent/config.json"},
		{"no command", func(m *request.Member) { m.Args = nil }, "no command"},
		{"empty command", func(m *request.Member) { m.Args = []string{""} }, "no command"},
		{"nul in argument", func(m *request.Member) { m.Args = []string{"a", "b\x00"} }, "argument 1 contains a NUL"},
		{"long argument", func(m *request.Member) { m.Args = []string{"a", strings.Repeat("x", 10_000)} }, ""},
		{"too long argument", func(m *request.Member) { m.Args = []string{"a", strings.Repeat("x", 1<<17)} }, "argument 1 has 131072 bytes"},
		{"too many arguments", func(m *request.Member) { m.Args = slices.Repeat([]string{"xxxxxxxxxxxxxxx"}, 1<<16) }, "arguments and environment have"},
		{"env without =", func(m *request.Member) { m.Env = []string{"FOO"} }, `"FOO" is not NAME=VALUE`},
		{"env without name", func(m *request.Member) { m.Env = []string{"=x"} }, `"=x" is not NAME=VALUE`},
		{"env with nul", func(m *request.Member) { m.Env = []string{"A=\x00"} }, `"A" contains a NUL`},
		{"cwd relative", func(m *request.Member) { m.Cwd = "tmp" }, `working directory "tmp" is not an absolute path`},
		{"log relative", func(m *request.Member) { m.LogPath = "log" }, `log path "log" is not an absolute path`},
		{"custody", func(m *request.Member) { m.Custody = "sometimes" }, `unknown custody "sometimes" (one of always, failure, never)`},
		{"signal", func(m *request.Member) { m.StopSignal = "SIGFOO" }, `stop signal: unknown signal "SIGFOO"`},
		{"label", func(m *request.Member) { m.Labels = map[string]string{"": "x"} }, `label "=x" lacks a key`},
		{"labels too large", func(m *request.Member) { m.Labels = map[string]string{"a": strings.Repeat("x", 1<<16)} }, "labels have 65537 bytes"},
		{"privileged bundle", func(m *request.Member) { m.Rootfs, m.Bundle, m.Privileged = "", root, true }, "privileged and bundle exclude"},

		{"unknown user", func(m *request.Member) { m.User = "eve" }, `user "eve" is not in the root's /etc/passwd`},
		{"unknown group", func(m *request.Member) { m.User = "bob:eve" }, `group "eve" is not in the root's /etc/group`},
		{"uid too large", func(m *request.Member) { m.User = "4294967295" }, "id 4294967295 is above 4294967294"},
		{"gid too large", func(m *request.Member) { m.User = "0:4294967295" }, "id 4294967295 is above 4294967294"},
		{"negative uid", func(m *request.Member) { m.User = "-1" }, `user "-1" is not in`},
		{"no group", func(m *request.Member) { m.User = "0:" }, `user "0:" lacks the group`},
		{"no user", func(m *request.Member) { m.User = ":0" }, `user ":0" lacks the user`},
		{"user with newline", func(m *request.Member) { m.User = "a\nb" }, `user "a\nb" contains a control character`},

		{"volume", vol(request.Volume{Source: root, Target: "/data"}), ""},
		{"volume source missing", vol(request.Volume{Source: "/nonexistent", Target: "/data"}), "volume source: /nonexistent: no such file"},
		{"volume source relative", vol(request.Volume{Source: "x", Target: "/data"}), `volume source "x" is not an absolute path`},
		{"volume target relative", vol(request.Volume{Source: root, Target: "data"}), `volume "data" is not an absolute path`},
		{"volume target with ..", vol(request.Volume{Source: root, Target: "/a/../b"}), `volume "/a/../b" is not in its shortest form "/b"`},
		{"volume on root", vol(request.Volume{Source: root, Target: "/"}), `volume "/" is the root itself`},
		{"volume in proc", vol(request.Volume{Source: root, Target: "/proc/sys"}), "nothing can be mounted in /proc"},
		{"volume twice", vol(request.Volume{Source: root, Target: "/a"}, request.Volume{Source: root, Target: "/a/"}), "there is a volume already"},
		{"tmpfs", tmp(request.Tmpfs{Target: "/a"}), ""},
		{"tmpfs negative", tmp(request.Tmpfs{Target: "/a", Size: -1}), "tmpfs /a: size -1 is negative"},
		{"tmpfs tiny", tmp(request.Tmpfs{Target: "/a", Size: 1}), "tmpfs /a: size 1 is less than a page"},
		{"tmpfs relative", tmp(request.Tmpfs{Target: "a"}), `tmpfs "a" is not an absolute path`},
		{"tmpfs twice", tmp(request.Tmpfs{Target: "/a"}, request.Tmpfs{Target: "/a"}), "there is a tmpfs already"},

		{"memory", func(m *request.Member) { m.Memory = 1 << 20 }, ""},
		{"memory low", func(m *request.Member) { m.Memory = 1<<20 - 1 }, "memory 1048575: the limit must be at least"},
		{"memory negative", func(m *request.Member) { m.Memory = -1 }, "memory -1"},
		{"cpus low", func(m *request.Member) { m.NanoCPUs = 5e6 }, "cpus 0.005: the kernel takes no less than 0.01"},
		{"cpus negative", func(m *request.Member) { m.NanoCPUs = -1e9 }, "cpus -1"},
		{"cpus high", func(m *request.Member) { m.NanoCPUs = 1 << 62 }, "more than any machine has"},
		{"pids negative", func(m *request.Member) { m.PidsLimit = -1 }, "pids limit -1 is negative"},
		{"cap add", func(m *request.Member) { m.CapAdd = []string{"FOO"} }, `cap-add: unknown capability "FOO"`},
		{"cap drop", func(m *request.Member) { m.CapDrop = []string{"CAP_FOO"} }, `cap-drop: unknown capability "CAP_FOO"`},
		{"cap both", func(m *request.Member) { m.CapAdd, m.CapDrop = []string{"chown"}, []string{"CAP_CHOWN"} }, "CAP_CHOWN is both added and dropped"},

		{"pid of the sandbox", ns("pid=sandbox"), "pid=sandbox: the sandbox holds no pid namespace: create it with --share pid"},
		{"mnt of the sandbox", ns("mnt=sandbox"), "mnt=sandbox: a sandbox has no mnt namespace"},
		{"user private", ns("user=private"), "user=private is not supported: create the sandbox with --share user"},
		{"no such member", ns("pid=member:nobody"), "pid=member:nobody: the sandbox has no such member"},
		{"pid of running", ns("pid=member:web"), ""},
		{"pid of dead", ns("pid=member:dead"), "pid namespace of member dead is dead: its init has exited"},
		{"cgroup of dead in custody", ns("cgroup=member:dead"), ""},
		{"cgroup of gone", ns("cgroup=member:gone"), "cgroup=member:gone: the member has exited and its namespaces are not held"},
		{"net of gone is the sandbox's", ns("net=member:gone"), ""},
		{"circle", ns("net=member:ring"), "join each other in a circle"},
		{"unknown kind", func(m *request.Member) { m.Namespaces = namespace.Selection{"foo": {From: namespace.Host}} }, `unknown namespace type "foo"`},
		{"unknown source", func(m *request.Member) { m.Namespaces = namespace.Selection{namespace.Net: {From: "foo"}} }, `net: unknown namespace source "foo"`},

		{"mnt of member", shared("mnt=member:web", nop), ""},
		{"mnt of dead", shared("mnt=member:dead", nop), ""},
		{"mnt of host", shared("mnt=host", nop), ""},
		{"mnt of host and rootfs", shared("mnt=host", func(m *request.Member) { m.Rootfs = root }), "mnt=host and a rootfs exclude each other"},
		{"mnt of member and rootfs", shared("mnt=member:web", func(m *request.Member) { m.Rootfs = root }), "mnt=member:web and a rootfs exclude each other"},
		{"mnt of member and volume", shared("mnt=member:web", vol(request.Volume{Source: root, Target: "/x"})), "mnt=member:web and volumes exclude"},
		{"mnt of member and tmpfs", shared("mnt=member:web", tmp(request.Tmpfs{Target: "/x"})), "mnt=member:web and tmpfs mounts exclude"},
		{"mnt of member and read-only", shared("mnt=member:web", func(m *request.Member) { m.ReadOnly = true }), "mnt=member:web and a read-only root exclude"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := &request.Member{Rootfs: root, Args: []string{"true"}}
			tt.mod(m)
			_, err := Resolve(m, facts())
			check(t, err, tt.want)
		})
	}
}

func TestResolveNamespaces(t *testing.T) {
	root := rootfs(t)
	tests := []struct {
		name, holds, ask, want, private string
	}{
		{"defaults", "net,ipc,uts", "",
			"net=sandbox,ipc=sandbox,uts=sandbox,pid=private,mnt=private,user=host,cgroup=private,time=host", "pid,mnt,cgroup"},
		{"all held", "net,ipc,uts,pid,user,cgroup,time", "",
			"net=sandbox,ipc=sandbox,uts=sandbox,pid=sandbox,mnt=private,user=sandbox,cgroup=sandbox,time=sandbox", "mnt"},
		{"none held", "", "",
			"net=host,ipc=host,uts=host,pid=private,mnt=private,user=host,cgroup=private,time=host", "pid,mnt,cgroup"},
		{"asked for", "net,ipc,uts", "net=private,pid=member:web,uts=host",
			"net=private,ipc=sandbox,uts=host,pid=member:web,mnt=private,user=host,cgroup=private,time=host", "net,mnt,cgroup"},
		{"passed on", "net,ipc,uts", "net=member:shares,pid=member:shares,user=member:shares",
			"net=sandbox,ipc=sandbox,uts=sandbox,pid=member:web,mnt=private,user=host,cgroup=private,time=host", "mnt,cgroup"},
		{"by id", "net,ipc,uts", "pid=member:1111111111111111",
			"net=sandbox,ipc=sandbox,uts=sandbox,pid=member:web,mnt=private,user=host,cgroup=private,time=host", "mnt,cgroup"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sb := facts()
			var err error
			if sb.Holds, err = namespace.ParseKinds(tt.holds); err != nil {
				t.Fatal(err)
			}
			ask, err := namespace.ParseSelection(tt.ask)
			if err != nil {
				t.Fatal(err)
			}
			got, err := Resolve(&request.Member{Rootfs: root, Args: []string{"true"}, Namespaces: ask}, sb)
			if err != nil {
				t.Fatal(err)
			}
			if got.Namespaces.String() != tt.want {
				t.Errorf("namespaces %s, want %s", got.Namespaces, tt.want)
			}
			var private []string
			for _, ns := range got.Spec.Linux.Namespaces {
				k, err := namespace.ParseKind(string(ns.Type))
				if err != nil || ns.Path != "" {
					t.Errorf("namespace %+v in the configuration: %v", ns, err)
				}
				private = append(private, string(k))
			}
			if p := strings.Join(private, ","); p != tt.private {
				t.Errorf("private in the configuration: %s, want %s", p, tt.private)
			}
		})
	}
}

func TestResolveUser(t *testing.T) {
	root := rootfs(t)
	tests := []struct {
		user string
		want specs.User
		home string
	}{
		{"", specs.User{}, "/root"},
		{"bob", specs.User{UID: 1000, GID: 100, AdditionalGids: []uint32{10, 29}}, "/home/bob"},
		{"1000", specs.User{UID: 1000, GID: 100, AdditionalGids: []uint32{10, 29}}, "/home/bob"},
		{"bob:wheel", specs.User{UID: 1000, GID: 10}, "/home/bob"},
		{"bob:5", specs.User{UID: 1000, GID: 5}, "/home/bob"},
		{"4242", specs.User{UID: 4242}, "/"},
		{"4242:wheel", specs.User{UID: 4242, GID: 10}, "/"},
		{"4294967294", specs.User{UID: 4294967294}, "/"},
		{"1234", specs.User{UID: 7, GID: 8}, "/seven"}, // a name made of digits, as useradd(8) would not
		{"nohome", specs.User{UID: 9, GID: 9}, "/"},
	}
	for _, tt := range tests {
		t.Run(tt.user, func(t *testing.T) {
			got, err := Resolve(&request.Member{Rootfs: root, Args: []string{"true"}, User: tt.user}, facts())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got.Spec.Process.User); diff != "" {
				t.Errorf("user (-want +got):\n%s", diff)
			}
			if env := got.Spec.Process.Env; !slices.Contains(env, "HOME="+tt.home) {
				t.Errorf("environment %q lacks HOME=%s", env, tt.home)
			}
		})
	}
}

func TestCheckSysctl(t *testing.T) {
	all := namespace.Kinds()
	tests := []struct {
		key   string
		kinds []namespace.Kind
		want  string
	}{
		{"net.ipv4.ip_forward", all, ""},
		{"net/ipv4/conf/eth0.1/forwarding", all, ""},
		{"net.ipv4.ip_forward", []namespace.Kind{namespace.IPC}, "of the net namespace, which is not its own"},
		{"kernel.shmmax", []namespace.Kind{namespace.IPC}, ""},
		{"kernel.sem", []namespace.Kind{namespace.Net}, "of the ipc namespace"},
		{"fs.mqueue.msg_max", []namespace.Kind{namespace.IPC}, ""},
		{"kernel.hostname", []namespace.Kind{namespace.UTS}, ""},
		{"kernel.domainname", nil, "of the uts namespace"},
		{"kernel.core_pattern", all, "can only be set for the whole host"},
		{"kernel.shmmaxx", all, "can only be set for the whole host"},
		{"vm.swappiness", all, "can only be set for the whole host"},
		{"", all, "is not a name"},
		{"net..x", all, "is not a name"},
		{"net/../kernel/core_pattern", all, "is not a name"},
		{"net.ipv4/../../kernel/core_pattern", all, "is not a name"},
		{"/net/ipv4/ip_forward", all, "is not a name"},
		{"net.ipv4.", all, "is not a name"},
		{"net.ipv4.x\n", all, "control character"},
	}
	for _, tt := range tests {
		check(t, CheckSysctl(tt.key, tt.kinds), tt.want)
	}
}
