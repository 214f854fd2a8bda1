//go:build ignore

/* The monitor's logger, under the sanitizers: it is given what a member writes,
 * and gives back the log. log_test.go reads that with package crilog.
 *
 * A request on stdin, in the machine's byte order: u32 length of what follows,
 * u32 log_max, then for each write of the member u8 stream, u16 length, bytes. The
 * answer on stdout: u32 length of what follows, u64 output_bytes[2], u64
 * log_errors, the log. */
#include <string.h>

#include "../../internal/launch/launch.h"

#undef ENTRY
#define ENTRY(cmain)
/* Of stdlib.h, which does not go together with the kernel's headers. */
void *malloc(size_t n);
void free(void *p);
_Noreturn void abort(void);

/* The sanitizers have their own. */
#define memset monitor_memset
#include "../monitor.c"
#undef memset

static void check(long r) {
	if (IS_ERR(r))
		abort();
}

/* full reads or writes n bytes. It returns 0 at the end of the file. */
static int full(int writes, int fd, void *p, size_t n) {
	for (size_t done = 0; done < n;) {
		long r = writes ? SYS3(write, fd, (char *)p + done, n - done) : SYS3(read, fd, (char *)p + done, n - done);
		check(r);
		if (r == 0)
			return 0;
		done += (size_t)r;
	}
	return 1;
}

/* take feeds one request, of len bytes, to the logger. */
static void take(const uint8_t *in, size_t len) {
	int ends[2][2];
	for (int i = 0; i < 2; i++) {
		check(SYS2(pipe2, ends[i], O_NONBLOCK | O_CLOEXEC));
		streams[i] = (struct stream){ends[i][0], 0, 0, 0, lines[i], i ? " stderr " : " stdout "};
	}
	while (len >= 3) {
		int i = in[0] & 1;
		size_t n = (size_t)in[1] | (size_t)in[2] << 8;
		in += 3;
		len -= 3;
		if (n > len)
			n = len;
		if (n && !full(1, ends[i][1], (void *)in, n)) /* a pipe holds 64 KiB */
			abort();
		in += n;
		len -= n;
		while (stream_read(&streams[i]))
			;
	}
	drain();
	for (int i = 0; i < 2; i++) {
		check(SYS1(close, ends[i][0]));
		check(SYS1(close, ends[i][1]));
	}
}

int main(void) {
	static struct status status;
	long log = SYS2(memfd_create, "log", 0);
	check(log);
	check(SYS3(dup3, log, FD_LOG, 0));
	check(SYS3(fcntl, FD_LOG, F_SETFL, O_APPEND));
	st = &status;
	for (uint32_t head[2]; full(0, 0, head, sizeof head);) {
		uint8_t *in = malloc(head[0] ? head[0] : 1);
		if (!in || (head[0] && !full(0, 0, in, head[0])))
			abort();
		check(SYS2(ftruncate, FD_LOG, 0));
		memset(&status, 0, sizeof status);
		log_max = head[1];
		log_size = 0;
		take(in, head[0]);
		free(in);
		long size = SYS3(lseek, FD_LOG, 0, 2);
		check(size);
		size_t n = (size_t)size + 24;
		char *out = malloc(n);
		if (!out)
			abort();
		memcpy(out, status.output_bytes, 16);
		memcpy(out + 16, &status.log_errors, 8);
		if (size && SYS4(pread64, FD_LOG, out + 24, size, 0) != size)
			abort();
		uint32_t len = (uint32_t)n;
		if (!full(1, 1, &len, sizeof len) || !full(1, 1, out, n))
			abort();
		free(out);
	}
	return 0;
}
