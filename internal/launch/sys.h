/* Raw system calls for the freestanding programs: no libc, no errno, no state.
 *
 * A call returns what the kernel returned: a negative value above -4096 is an
 * errno (syscall(2), "Architecture calling conventions"). */
#ifndef SANDBOXD_SYS_H
#define SANDBOXD_SYS_H

#include <stddef.h>
#include <stdint.h>
#include <asm/unistd.h>

#define IS_ERR(r) ((unsigned long)(r) > -4096UL)

#if defined(__x86_64__)
static inline long syscall6(long nr, long a, long b, long c, long d, long e, long f) {
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	register long r9 __asm__("r9") = f;
	long ret;
	__asm__ volatile("syscall"
	                 : "=a"(ret)
	                 : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
	                 : "rcx", "r11", "memory");
	return ret;
}

static inline long syscall3(long nr, long a, long b, long c) {
	long ret;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(nr), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
	return ret;
}

/* The kernel enters with argc at the stack pointer; hand its address to cmain. */
#define ENTRY(cmain)                         \
	__asm__(".text\n.global _start\n_start:\n" \
	        "xor %ebp, %ebp\n"                 \
	        "mov %rsp, %rdi\n"                 \
	        "and $-16, %rsp\n"                 \
	        "call " #cmain "\n"                \
	        "hlt\n")
#elif defined(__aarch64__)
static inline long syscall6(long nr, long a, long b, long c, long d, long e, long f) {
	register long x8 __asm__("x8") = nr;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	register long x3 __asm__("x3") = d;
	register long x4 __asm__("x4") = e;
	register long x5 __asm__("x5") = f;
	__asm__ volatile("svc #0"
	                 : "+r"(x0)
	                 : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5)
	                 : "memory");
	return x0;
}

static inline long syscall3(long nr, long a, long b, long c) {
	register long x8 __asm__("x8") = nr;
	register long x0 __asm__("x0") = a;
	register long x1 __asm__("x1") = b;
	register long x2 __asm__("x2") = c;
	__asm__ volatile("svc #0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2) : "memory");
	return x0;
}

#define ENTRY(cmain)                         \
	__asm__(".text\n.global _start\n_start:\n" \
	        "mov x29, #0\n"                    \
	        "mov x30, #0\n"                    \
	        "mov x0, sp\n"                     \
	        "bl " #cmain "\n"                  \
	        "brk #0\n")
#else
#error "sandboxd runs on amd64 and arm64"
#endif

#define SYS0(n) syscall3(__NR_##n, 0, 0, 0)
#define SYS1(n, a) syscall3(__NR_##n, (long)(a), 0, 0)
#define SYS2(n, a, b) syscall3(__NR_##n, (long)(a), (long)(b), 0)
#define SYS3(n, a, b, c) syscall3(__NR_##n, (long)(a), (long)(b), (long)(c))
#define SYS4(n, a, b, c, d) syscall6(__NR_##n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define SYS5(n, a, b, c, d, e) syscall6(__NR_##n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define SYS6(n, a, b, c, d, e, f) \
	syscall6(__NR_##n, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))

static inline _Noreturn void sys_exit(int code) {
	SYS1(exit_group, code);
	__builtin_trap(); /* a seccomp filter that allows nothing, not even this */
}

#endif
