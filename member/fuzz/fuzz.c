//go:build ignore

/* What the freestanding programs read before they trust it, under libFuzzer and
 * the sanitizers: the monitor's configuration with a launch program behind it,
 * as begin() in monitor.c takes them. */
#define PROG_NO_RUN
#include <stdlib.h>
#include <string.h>

#include "../../internal/launch/launch.h"
#include "../monitor.h"

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len);

/* use touches all that an accepted program may be asked for. */
static void use(struct program *p) {
	volatile uint64_t sum = 0;
	prog_relocate(p);
	for (uint32_t i = 0; i < p->nops; i++) {
		struct prog_op *op = &p->ops[i];
		if (i + op->ok_skip >= p->nops || i + op->err_skip >= p->nops)
			abort();
		for (int k = 0; k < 6; k++) {
			if (op->kind[k] == ARG_DATA)
				sum += (uint64_t)p->data[op->arg[k]];
			else if (op->kind[k] == ARG_RESULT && op->arg[k] >= i)
				abort();
		}
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *in, size_t len) {
	/* A copy of exactly this length, writable as a private mapping is; malloc
	 * aligns to 16, as the page and program_offset do. */
	void *buf = malloc(len ? len : 1);
	if (!buf)
		return 0;
	memcpy(buf, in, len);
	struct program p;
	if (prog_open(&p, buf, len) == 0)
		use(&p);
	memcpy(buf, in, len);
	struct config *c = buf;
	if (config_check(c, len) == 0) {
		if (strlen(c->log_path) >= LOG_PATH_MAX)
			abort();
		if (!(c->flags & FLAG_ADOPT) && prog_open(&p, (char *)buf + c->program_offset, c->program_len) == 0)
			use(&p);
	}
	free(buf);
	return 0;
}
