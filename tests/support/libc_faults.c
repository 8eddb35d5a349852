/* Let chosen libc calls of one shared object fail, in a running process.
 *
 * The object's relocations for those functions are pointed here. Every call goes on to libc (or to
 * the sanitizer before it), but for those a plan names: the `at`-th call of a function and the
 * `times` - 1 after it, or a call whose time to fail came by a counter shared by several functions.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#define FUNCTIONS(EACH)                                                                            \
	EACH(malloc, void *, NULL, (size_t a), (a))                                                \
	EACH(calloc, void *, NULL, (size_t a, size_t b), (a, b))                                   \
	EACH(realloc, void *, NULL, (void *a, size_t b), (a, b))                                   \
	EACH(mmap, void *, MAP_FAILED, (void *a, size_t b, int c, int d, int e, off_t f),          \
	     (a, b, c, d, e, f))                                                                   \
	EACH(mremap, void *, MAP_FAILED, (void *a, size_t b, size_t c, int d), (a, b, c, d))       \
	EACH(pread, ssize_t, -1, (int a, void *b, size_t c, off_t d), (a, b, c, d))                \
	EACH(pwrite, ssize_t, -1, (int a, const void *b, size_t c, off_t d), (a, b, c, d))         \
	EACH(lseek, off_t, -1, (int a, off_t b, int c), (a, b, c))                                 \
	EACH(fallocate, int, -1, (int a, int b, off_t c, off_t d), (a, b, c, d))                   \
	EACH(ftruncate, int, -1, (int a, off_t b), (a, b))                                         \
	EACH(fdatasync, int, -1, (int a), (a))                                                     \
	EACH(msync, int, -1, (void *a, size_t b, int c), (a, synced(b, c), c))                     \
	EACH(sigaction, int, -1, (int a, const struct sigaction *b, struct sigaction *c), (a, b, c)) \
	EACH(send, ssize_t, -1, (int a, const void *b, size_t c, int d), (a, b, c, d))             \
	EACH(recv, ssize_t, -1, (int a, void *b, size_t c, int d), (a, b, c, d))                   \
	EACH(read, ssize_t, -1, (int a, void *b, size_t c), (a, b, c))                             \
	EACH(epoll_create1, int, -1, (int a), (a))                                                 \
	EACH(epoll_ctl, int, -1, (int a, int b, int c, struct epoll_event *d), (a, b, c, d))       \
	EACH(eventfd, int, -1, (unsigned a, int b), (a, b))

enum {
#define NUMBER(name, type, failure, parameters, arguments) AT_##name,
	FUNCTIONS(NUMBER) NR_FUNCTIONS
};

static unsigned planned; /* a bit for each function that counts */
static long calls, first, last;
static int error_number;

static int fails(int function)
{
	long call;
	if (!(__atomic_load_n(&planned, __ATOMIC_ACQUIRE) >> function & 1))
		return 0;
	call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
	if (call < first || call > last)
		return 0;
	errno = error_number;
	return 1;
}

static size_t synced_bytes;

static size_t synced(size_t size, int flags)
{
	if (flags & MS_SYNC)
		__atomic_add_fetch(&synced_bytes, size, __ATOMIC_SEQ_CST);
	return size;
}

/* The bytes that msync was to bring to the disk since the last call of this function. */
size_t faults_synced(void)
{
	return __atomic_exchange_n(&synced_bytes, 0, __ATOMIC_SEQ_CST);
}

#define WRAPPER(name, type, failure, parameters, arguments)                                        \
	static type my_##name parameters                                                           \
	{                                                                                          \
		return fails(AT_##name) ? failure : name arguments;                                \
	}
FUNCTIONS(WRAPPER)

static const struct {
	const char *name;
	void *mine;
} table[] = {
#define ROW(name, type, failure, parameters, arguments) { #name, (void *)my_##name },
	FUNCTIONS(ROW)
};

static int find(const char *name)
{
	size_t length = strlen(name);
	if (length > 2 && !strcmp(name + length - 2, "64"))
		length -= 2;
	for (int i = 0; i < NR_FUNCTIONS; i++)
		if (strlen(table[i].name) == length && !memcmp(table[i].name, name, length))
			return i;
	return -1;
}

/* Count calls of the functions whose names are in `names`, with blanks between, and fail those
 * from number `at` (1 is the first) with `error`, `times` of them. 0, or -1 for an unknown name. */
int faults_plan(const char *names, long at, long times, int error)
{
	unsigned mask = 0;
	char copy[256], *name, *rest = copy;
	strncpy(copy, names, sizeof copy - 1);
	copy[sizeof copy - 1] = 0;
	while ((name = strsep(&rest, " "))) {
		int i = find(name);
		if (i < 0)
			return -1;
		mask |= 1u << i;
	}
	__atomic_store_n(&planned, 0, __ATOMIC_SEQ_CST);
	calls = 0;
	first = at;
	last = at + times - 1;
	error_number = error;
	__atomic_store_n(&planned, mask, __ATOMIC_SEQ_CST);
	return 0;
}

/* Let nothing fail any more; the number of calls counted. */
long faults_end(void)
{
	__atomic_store_n(&planned, 0, __ATOMIC_SEQ_CST);
	return __atomic_load_n(&calls, __ATOMIC_SEQ_CST);
}

static int patch(const struct link_map *object, const ElfW(Rela) *rela, size_t size,
		 const ElfW(Sym) *symbols, const char *strings)
{
	int patched = 0;
	long page = sysconf(_SC_PAGESIZE);
	for (size_t i = 0; i < size / sizeof *rela; i++) {
		int found = find(strings + symbols[ELF64_R_SYM(rela[i].r_info)].st_name);
		uintptr_t slot = object->l_addr + rela[i].r_offset;
		if (!ELF64_R_SYM(rela[i].r_info) || found < 0 || rela[i].r_addend)
			continue;
		if (mprotect((void *)(slot & -page), page, PROT_READ | PROT_WRITE))
			return -1;
		*(void **)slot = table[found].mine;
		patched++;
	}
	return patched;
}

/* Point the relocations of the loaded object at `path` here; how many, or -1. */
int faults_install(const char *path)
{
	struct link_map *object;
	void *handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
	const ElfW(Rela) *rela = NULL, *plt = NULL;
	const ElfW(Sym) *symbols = NULL;
	const char *strings = NULL;
	size_t rela_size = 0, plt_size = 0;
	int count = 0, more;
	if (!handle || dlinfo(handle, RTLD_DI_LINKMAP, &object))
		return -1;
	for (const ElfW(Dyn) *d = object->l_ld; d->d_tag != DT_NULL; d++) {
		if (d->d_tag == DT_RELA)
			rela = (const void *)d->d_un.d_ptr;
		else if (d->d_tag == DT_RELASZ)
			rela_size = d->d_un.d_val;
		else if (d->d_tag == DT_JMPREL)
			plt = (const void *)d->d_un.d_ptr;
		else if (d->d_tag == DT_PLTRELSZ)
			plt_size = d->d_un.d_val;
		else if (d->d_tag == DT_SYMTAB)
			symbols = (const void *)d->d_un.d_ptr;
		else if (d->d_tag == DT_STRTAB)
			strings = (const void *)d->d_un.d_ptr;
	}
	if (!symbols || !strings)
		return -1;
	more = rela ? patch(object, rela, rela_size, symbols, strings) : 0;
	count += more;
	if (plt && more >= 0)
		count += more = patch(object, plt, plt_size, symbols, strings);
	dlclose(handle);
	return more < 0 ? -1 : count;
}
