//go:build ignore

/* launch executes one launch program: `exec` and `join` start processes with
 * it, where there is no monitor. The program is read from PROGRAM_FD. */
#include "launch.h"

#define PROGRAM_FD 5

__attribute__((used)) _Noreturn static void launch_main(void) {
	SYS5(prctl, 4 /* PR_SET_DUMPABLE */, 0, 0, 0, 0);
	SYS5(prctl, 15 /* PR_SET_NAME */, "sandboxd-launch", 0, 0, 0);
	SYS3(fcntl, STATUS_FD, 2 /* F_SETFD */, 1 /* FD_CLOEXEC */);
	SYS3(fcntl, START_FD, 2, 1);
	long len = SYS3(lseek, PROGRAM_FD, 0, 2 /* SEEK_END */);
	long err = len;
	if (!IS_ERR(len)) {
		/* Private and writable: the data is the calls' scratch memory too. */
		long base = SYS6(mmap, 0, len, 3 /* READ|WRITE */, 2 /* MAP_PRIVATE */, PROGRAM_FD, 0);
		err = base;
		if (!IS_ERR(base)) {
			SYS1(close, PROGRAM_FD);
			struct program p;
			if (prog_open(&p, (void *)base, (uint64_t)len) == 0)
				prog_run(&p, 0);
			err = -22; /* EINVAL */
		}
	}
	prog_report(REPORT_FAILED, ~0u, (int32_t)-err);
	sys_exit(125);
}

ENTRY(launch_main);
