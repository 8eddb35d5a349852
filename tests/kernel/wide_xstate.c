/* User Mode Linux 6.1 restores the floating-point state of its processes with PTRACE_SETREGSET
 * from a buffer that is too small for processors with AMX: the host answers EFAULT and the guest
 * panics before its first instruction. Preloaded, this puts the state in a buffer that holds the
 * host's whole layout: what UML knows comes from UML, the rest stays as it is in the process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

enum { STATE_BV = 512, KNOWN_TO_UML = 0xffff };

long ptrace(enum __ptrace_request request, ...)
{
    static long (*real)(enum __ptrace_request, int, void *, void *);
    static char whole[1 << 16] __attribute__((aligned(64)));
    va_list args;

    va_start(args, request);
    int pid = va_arg(args, int);
    void *address = va_arg(args, void *);
    void *data = va_arg(args, void *);
    va_end(args);
    if (!real)
        *(void **)&real = dlsym(RTLD_NEXT, "ptrace");
    if (request != PTRACE_SETREGSET || (unsigned long)address != NT_X86_XSTATE)
        return real(request, pid, address, data);

    struct iovec *part = data, all = {whole, sizeof whole};
    unsigned long long before, after;
    if (real(PTRACE_GETREGSET, pid, address, &all) < 0)
        return -1;
    memcpy(&before, whole + STATE_BV, sizeof before);
    memcpy(whole, part->iov_base, part->iov_len < all.iov_len ? part->iov_len : all.iov_len);
    memcpy(&after, whole + STATE_BV, sizeof after);
    after = (after & KNOWN_TO_UML) | (before & ~(unsigned long long)KNOWN_TO_UML);
    memcpy(whole + STATE_BV, &after, sizeof after);
    return real(PTRACE_SETREGSET, pid, address, &all);
}
