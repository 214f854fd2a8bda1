/* What the monitor and package member tell each other in memory: the
 * configuration in front of the launch program, and the status page.
 * docs/ARCHITECTURE.md has the protocol; monitor.go and status.go the other
 * side of it. All numbers are little endian, as both architectures are. */
#ifndef SANDBOXD_MONITOR_H
#define SANDBOXD_MONITOR_H

#include <stdint.h>

#define CONFIG_MAGIC 0x434d4253u /* "SBMC" */
#define CONFIG_VERSION 1u
#define LOG_PATH_MAX 4096u /* PATH_MAX, the NUL counted */

enum { FLAG_TTY = 1, FLAG_ADOPT = 2, FLAG_STDIN = 4, FLAG_RUN = 8 };
enum { CUSTODY_ALWAYS = 0, CUSTODY_FAILURE = 1, CUSTODY_NEVER = 2 };

struct config {
	uint32_t magic, version;
	uint32_t flags, custody;
	uint32_t log_path_len; /* the NUL counted */
	uint32_t program_offset, program_len;
	uint32_t init_pid;
	uint64_t log_max_bytes, init_start;
	char log_path[];
};

/* config_check returns 0, or the number of the check that failed. It reads
 * nothing outside c[0..len). */
static int config_check(const struct config *c, uint64_t len) {
	if (len < sizeof *c)
		return 1;
	if (c->magic != CONFIG_MAGIC || c->version != CONFIG_VERSION)
		return 2;
	if (c->flags > (FLAG_TTY | FLAG_ADOPT | FLAG_STDIN | FLAG_RUN) || c->custody > CUSTODY_NEVER)
		return 3;
	if (c->log_path_len < 2 || c->log_path_len > LOG_PATH_MAX || c->log_path_len > len - sizeof *c)
		return 4;
	if (c->log_path[0] != '/' || c->log_path[c->log_path_len - 1] != 0)
		return 5;
	if (c->flags & FLAG_ADOPT)
		return c->program_len == 0 && c->init_pid > 0 && c->init_pid <= INT32_MAX ? 0 : 6;
	if (c->program_offset % 16 != 0 || c->program_offset < sizeof *c + c->log_path_len ||
	    c->program_offset > len || c->program_len != len - c->program_offset)
		return 7;
	return 0;
}

#define STATUS_MAGIC 0x534d4253u /* "SBMS" */
#define STATUS_VERSION 1u
#define STATUS_SIZE 4096

enum { PHASE_NONE, PHASE_CREATED, PHASE_RUNNING, PHASE_EXITED, PHASE_FAILED };
enum { STATUS_EXEC_FAILED = 1, STATUS_CUSTODY = 2, STATUS_UNKNOWN = 4, STATUS_STDIN_CLOSED = 8 };

/* fail_op below zero: what failed was none of the program's calls. */
enum {
	FAIL_KILLED = -1,  /* the child died without a word; wait_status says how */
	FAIL_LOG = -2,     /* the log could not be opened */
	FAIL_CONFIG = -3,  /* the configuration or the program is malformed */
	FAIL_SETUP = -4,   /* the monitor lacked a descriptor or could not fork */
	FAIL_CUSTODY = -5, /* root, namespaces or terminal could not be got hold of */
};

struct status {
	uint32_t magic, version;
	uint32_t phase, flags;
	int32_t monitor_pid, init_pid;
	uint64_t init_start;
	uint64_t created_ns, started_ns, finished_ns;
	int32_t fail_op, fail_errno;
	int32_t wait_status;
	uint32_t oom_kills;
	uint64_t output_bytes[2];
	uint64_t log_errors, clients_dropped;
};

#endif
