//go:build ignore

/* bare is what an exec in a member cannot go below: it joins the namespaces, the
 * cgroups and with the mnt namespace the root of a process, forks, since only a
 * child is in the pid namespace, and in the cgroup v2 directory, and executes.
 *
 *	bare PID NAMESPACES CGROUP2 TASKS…
 *
 * NAMESPACES are CLONE_NEW* flags, CGROUP2 is a cgroup v2 directory or "", TASKS
 * are files of v1. The exit code is that of the member's /bin/true. */
#include "sys.h"

static unsigned long number(const char *s) {
	unsigned long n = 0;
	while (*s)
		n = n * 10 + (unsigned long)(*s++ - '0');
	return n;
}

static long must(long r) {
	if (IS_ERR(r))
		sys_exit(125);
	return r;
}

__attribute__((used)) _Noreturn static void bare(long *stack) {
	char **argv = (char **)(stack + 1);
	long pidfd = must(SYS2(pidfd_open, number(argv[1]), 0));
	for (char **tasks = argv + 4; *tasks; tasks++)
		must(SYS3(write, must(SYS4(openat, -100 /* AT_FDCWD */, *tasks, 02000001 /* O_WRONLY|O_CLOEXEC */, 0)), "0", 1));
	uint64_t args[11] = {0, 0, 0, 0, 17 /* SIGCHLD */}; /* struct clone_args of clone(2) */
	if (*argv[3]) {
		args[0] = 0x200000000; /* CLONE_INTO_CGROUP */
		args[10] = (uint64_t)must(SYS4(openat, -100, argv[3], 012000000 /* O_PATH|O_CLOEXEC */, 0));
	}
	must(SYS2(setns, pidfd, number(argv[2])));
	long child = must(SYS2(clone3, args, sizeof args));
	if (child == 0) {
		const char *cmd[] = {"/bin/true", 0};
		SYS3(execve, cmd[0], cmd, cmd + 1);
		sys_exit(127);
	}
	int status;
	must(SYS4(wait4, child, &status, 0, 0));
	sys_exit(status & 0x7f ? 126 : status >> 8 & 0xff);
}

ENTRY(bare);
