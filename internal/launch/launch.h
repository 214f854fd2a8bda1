/* The interpreter of launch programs.
 *
 * A launch program is a flat list of system calls, made by package launch in
 * Go. Nothing here knows what a container is. See program.go for the meaning;
 * this file and the encoder there must agree to the byte.
 *
 *   header   32 bytes
 *   ops      72 bytes each
 *   relocs    8 bytes each
 *   data     data_len bytes, 16-aligned; pointers point only into it
 */
#ifndef SANDBOXD_LAUNCH_H
#define SANDBOXD_LAUNCH_H

#include "sys.h"

#define PROG_MAGIC 0x504c4253u /* "SBLP" */
#define PROG_VERSION 1u
#define PROG_MAX_OPS 2048u
#define PROG_MAX_LEN (8u << 20)

struct prog_header {
	uint32_t magic, version;
	uint32_t nops, nrelocs;
	uint32_t data_len, pad[3];
};

enum { ARG_INT = 0, ARG_DATA = 1, ARG_RESULT = 2 };

struct prog_op {
	uint32_t nr;         /* a system call, or one of NR_* below */
	uint8_t kind[6];     /* ARG_* of each argument */
	uint16_t ok_skip;    /* ops to pass over when this one succeeds */
	uint16_t err_skip;   /* ops to pass over when it fails with an ignored errno */
	uint16_t pad;
	uint16_t ignore[4];  /* errnos that are not failures; 0 ends the list */
	uint64_t arg[6];     /* a number, an offset into data, or the index of an earlier op */
};

struct prog_reloc {
	uint32_t at, target; /* *(u64 *)(data + at) = data + target */
};

/* NR_FORK makes a sibling that goes on with the next op; the process itself
 * reports the sibling's pid and exits with 0. Arg 0 is CLONE_NEWPID or 0, arg 1
 * is -1 or a descriptor of the cgroup v2 directory that the sibling is born in.
 * If arg 2 is not 0, the sibling goes on when its pid has been reported; else
 * what it reports may come before that.
 *
 * A starter that clones anyway does it so at once if the first op is a fork,
 * and has the child begin with the second. */
#define NR_FORK 0xf0000001u

/* What the child says on STATUS_FD, in this form only. */
struct report {
	uint32_t kind;
	uint32_t op;
	int32_t value;
};
enum { REPORT_PID = 1, REPORT_CREATED = 2, REPORT_FAILED = 3 };

#define STATUS_FD 3
#define START_FD 4

struct program {
	struct prog_op *ops;
	struct prog_reloc *relocs;
	char *data;
	uint32_t nops, nrelocs, data_len;
};

/* prog_open checks the program in buf and fills p. It returns 0, or the number
 * of the check that failed. It reads nothing outside buf[0..len). */
static int prog_open(struct program *p, void *buf, uint64_t len) {
	struct prog_header *h = buf;
	if (len < sizeof *h || len > PROG_MAX_LEN)
		return 1;
	if (h->magic != PROG_MAGIC || h->version != PROG_VERSION)
		return 2;
	if (h->nops == 0 || h->nops > PROG_MAX_OPS || h->nrelocs > PROG_MAX_LEN / 8 ||
	    h->data_len > PROG_MAX_LEN)
		return 3;
	uint64_t ops = sizeof *h;
	uint64_t relocs = ops + (uint64_t)h->nops * sizeof(struct prog_op);
	uint64_t data = (relocs + (uint64_t)h->nrelocs * sizeof(struct prog_reloc) + 15) & ~15ULL;
	if (data + h->data_len != len)
		return 4;
	p->ops = (struct prog_op *)((char *)buf + ops);
	p->relocs = (struct prog_reloc *)((char *)buf + relocs);
	p->data = (char *)buf + data;
	p->nops = h->nops;
	p->nrelocs = h->nrelocs;
	p->data_len = h->data_len;
	for (uint32_t i = 0; i < p->nops; i++) {
		struct prog_op *op = &p->ops[i];
		/* A skip may lead to the end of the program, which is a failure when
		 * it is reached, but not beyond. */
		if (op->ok_skip > p->nops - 1 - i || op->err_skip > p->nops - 1 - i)
			return 5;
		for (int k = 0; k < 6; k++) {
			switch (op->kind[k]) {
			case ARG_INT:
				break;
			case ARG_DATA:
				if (op->arg[k] >= p->data_len)
					return 6;
				break;
			case ARG_RESULT:
				if (op->arg[k] >= i)
					return 7;
				break;
			default:
				return 8;
			}
		}
	}
	for (uint32_t i = 0; i < p->nrelocs; i++) {
		struct prog_reloc *r = &p->relocs[i];
		if (r->at % 8 != 0 || p->data_len < 8 || r->at > p->data_len - 8 || r->target >= p->data_len)
			return 9;
	}
	return 0;
}

static void prog_relocate(struct program *p) {
	for (uint32_t i = 0; i < p->nrelocs; i++)
		*(uint64_t *)(p->data + p->relocs[i].at) = (uint64_t)(uintptr_t)(p->data + p->relocs[i].target);
}

#ifndef PROG_NO_RUN /* the fuzzer builds only what is above */

static void prog_report(uint32_t kind, uint32_t op, int32_t value) {
	struct report r = {kind, op, value};
	SYS3(write, STATUS_FD, &r, sizeof r);
}

static int prog_ignored(const struct prog_op *op, long err) {
	for (int k = 0; k < 4 && op->ignore[k]; k++)
		if (op->ignore[k] == err)
			return 1;
	return 0;
}

/* In a section that comes after the rest of .bss: a monitor never touches it, and
 * its other variables are then in one page. */
static long prog_results[PROG_MAX_OPS] __attribute__((section(".bss.large")));

/* prog_clone makes a child with the flags, born in a cgroup if there is one.
 * CLONE_INTO_CGROUP spares the write to cgroup.procs, which waits for an RCU
 * grace period. */
static long prog_clone(uint64_t flags, uint64_t exit_signal, long cgroup) {
	uint64_t args[11] = {flags, 0, 0, 0, exit_signal}; /* struct clone_args of clone(2) */
	if (cgroup >= 0) {
		args[0] |= 0x200000000; /* CLONE_INTO_CGROUP */
		args[10] = (uint64_t)cgroup;
	}
	return SYS2(clone3, args, sizeof args);
}

/* prog_fork makes the rest of the program run in a child. With CLONE_PARENT the
 * exit signal is the caller's own. */
static long prog_fork(uint32_t op, uint64_t flags, long cgroup, long waits) {
	int fds[2];
	char byte = 0;
	long r;
	if (waits) {
		r = SYS2(pipe2, fds, 02000000 /* O_CLOEXEC */);
		if (IS_ERR(r))
			return r;
	}
	r = prog_clone(flags | 0x8000 /* CLONE_PARENT */, 0, cgroup);
	if (r > 0) {
		prog_report(REPORT_PID, op, (int32_t)r);
		sys_exit(0); /* which closes the pipe */
	}
	if (waits) {
		SYS1(close, fds[1]);
		if (r == 0)
			SYS3(read, fds[0], &byte, 1);
		SYS1(close, fds[0]);
	}
	return r;
}

/* prog_run executes p from its op first on. The last one is an execve, and it does not return. A
 * failure is reported with the op's index and errno; the exit status is then
 * 127 if execve found nothing to execute, 126 if it could not execute it, and
 * 125 if another call failed. */
static _Noreturn void prog_run(struct program *p, uint32_t first) {
	prog_relocate(p);
	for (uint32_t i = 0; i < p->nops; i++)
		prog_results[i] = -1;
	uint32_t i = first;
	for (; i < p->nops; i++) {
		struct prog_op *op = &p->ops[i];
		long a[6];
		for (int k = 0; k < 6; k++) {
			a[k] = (long)op->arg[k];
			if (op->kind[k] == ARG_DATA)
				a[k] = (long)(p->data + op->arg[k]);
			else if (op->kind[k] == ARG_RESULT)
				a[k] = prog_results[op->arg[k]];
		}
		long r;
		if (op->nr == NR_FORK) {
			r = prog_fork(i, (uint64_t)a[0], a[1], a[2]);
		} else {
			r = syscall6(op->nr, a[0], a[1], a[2], a[3], a[4], a[5]);
		}
		prog_results[i] = r;
		if (!IS_ERR(r)) {
			i += op->ok_skip;
			continue;
		}
		if (prog_ignored(op, -r)) {
			i += op->err_skip;
			continue;
		}
		prog_report(REPORT_FAILED, i, (int32_t)-r);
		if (op->nr == __NR_execve)
			sys_exit(r == -2 /* ENOENT */ ? 127 : 126);
		sys_exit(125);
	}
	prog_report(REPORT_FAILED, i, 38 /* ENOSYS: the program had no execve at its end */);
	sys_exit(125);
}

#endif
#endif
