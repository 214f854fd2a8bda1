//go:build ignore

/* pause holds a sandbox's namespaces, and does nothing else.
 *
 *   argv: {"sandboxd-pause", MARK, SHMOPTS}
 *
 * It is started in its namespaces. With SHMOPTS, it makes a tmpfs with these
 * options its root, which is the sandbox's /dev/shm, and lets go of everything
 * of the host's; with an empty SHMOPTS it is in the mount namespace of an earlier
 * pause, whose root is that already. On descriptor 3 it then writes one byte, or
 * if a step failed, struct failure. Package pause in Go is the other side. */
#include "../internal/launch/sys.h"

#define READY_FD 3
#define NOBODY 65534

#define MS_NOSUID 2
#define MS_NODEV 4
#define MS_NOEXEC 8
#define MS_REC 16384
#define MS_PRIVATE (1 << 18)
#define MNT_DETACH 2
#define PR_SET_DUMPABLE 4
#define PR_SET_NAME 15
#define PR_CAPBSET_DROP 24
#define PR_SET_NO_NEW_PRIVS 38
#define SIGKILL 9
#define SIGSTOP 19
#define EINVAL 22
#define CAPABILITY_VERSION_3 0x20080522

/* As in start.go. */
enum step {
	STEP_PRIVATE = 1,
	STEP_MOUNT,
	STEP_CHDIR,
	STEP_PIVOT,
	STEP_DETACH,
	STEP_BOUNDING,
	STEP_GROUPS,
	STEP_GID,
	STEP_UID,
	STEP_CAPS,
	STEP_NNP,
	STEP_DUMPABLE,
	STEP_SIGNALS,
};

struct failure {
	uint32_t step;
	int32_t err;
};

static void must(enum step step, long r) {
	if (!IS_ERR(r))
		return;
	struct failure f = {step, (int32_t)-r};
	SYS3(write, READY_FD, &f, sizeof f);
	sys_exit(1);
}

static void make_root(const char *shmopts) {
	must(STEP_PRIVATE, SYS5(mount, 0, "/", 0, MS_REC | MS_PRIVATE, 0));
	/* Any directory that every host has will do. */
	must(STEP_MOUNT, SYS5(mount, "shm", "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, shmopts));
	must(STEP_CHDIR, SYS1(chdir, "/proc"));
	/* The old root ends up over the new one, and is where "." leads
	 * (pivot_root(2), "pivot_root(".", ".")"). */
	must(STEP_PIVOT, SYS2(pivot_root, ".", "."));
	must(STEP_DETACH, SYS2(umount2, ".", MNT_DETACH));
	must(STEP_CHDIR, SYS1(chdir, "/"));
}

static void drop_privileges(void) {
	for (long cap = 0; cap < 64; cap++) {
		long r = SYS2(prctl, PR_CAPBSET_DROP, cap);
		if (r == -EINVAL) /* past the last one that this kernel knows */
			break;
		must(STEP_BOUNDING, r);
	}
	must(STEP_GROUPS, SYS2(setgroups, 0, 0));
	must(STEP_GID, SYS3(setresgid, NOBODY, NOBODY, NOBODY));
	must(STEP_UID, SYS3(setresuid, NOBODY, NOBODY, NOBODY));
	/* setresuid has cleared all sets but the inheritable one. */
	uint32_t header[2] = {CAPABILITY_VERSION_3, 0}, none[6] = {0};
	must(STEP_CAPS, SYS2(capset, header, none));
	must(STEP_NNP, SYS5(prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	/* Last, because a change of uid sets it to fs.suid_dumpable. */
	must(STEP_DUMPABLE, SYS5(prctl, PR_SET_DUMPABLE, 0, 0, 0, 0));
}

/* Signals are ignored rather than blocked: blocked ones would be queued, and
 * members could queue them up to nobody's RLIMIT_SIGPENDING. And with SIGCHLD
 * ignored the kernel itself reaps what is re-parented to pid 1 (wait(2), "Notes"). */
static void ignore_signals(void) {
	struct {
		void *handler;
		unsigned long flags;
		void *restorer;
		uint64_t mask;
	} ignore = {(void *)1 /* SIG_IGN */, 0, 0, 0};
	for (long sig = 1; sig <= 64; sig++)
		if (sig != SIGKILL && sig != SIGSTOP)
			must(STEP_SIGNALS, SYS4(rt_sigaction, sig, &ignore, 0, sizeof ignore.mask));
}

__attribute__((used)) _Noreturn static void pause_main(const long *sp) {
	char **argv = (char **)(sp + 1);
	if (sp[0] != 3)
		sys_exit(2);
	ignore_signals();
	SYS5(prctl, PR_SET_NAME, argv[0], 0, 0, 0);
	if (argv[2][0])
		make_root(argv[2]);
	drop_privileges();
	SYS3(write, READY_FD, "", 1);
	/* Not one descriptor is left for anybody to find in /proc/1/fd. */
	SYS3(close_range, 0, ~0u, 0);
	for (;;)
		SYS5(ppoll, 0, 0, 0, 0, 0);
}

ENTRY(pause_main);
