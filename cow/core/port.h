/* What Cython cannot say: guarded memory access, atomics, the reader-writer lock.
 *
 * Guarded access. An image is mmap'd; a file cut short by somebody else, a full disk under a
 * sparse file and a disk error all arrive as SIGBUS. port_copy and its like turn that into
 * -EIO for the one call: a thread about to touch image memory points `port_guard` at a jump
 * buffer, and the handler jumps back to it. Nothing else in the package touches image memory.
 */
#ifndef COW_PORT_H
#define COW_PORT_H

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

static __thread sigjmp_buf *volatile port_guard __attribute__((tls_model("initial-exec")));
static struct sigaction port_next_sigbus;

static void port_on_sigbus(int signo, siginfo_t *info, void *context)
{
	(void)context;
	if (port_guard)
		siglongjmp(*port_guard, 1);
	/* Not ours: put back the handler that was there before and let the access fault again. */
	sigaction(signo, &port_next_sigbus, NULL);
	if (info->si_code <= 0)
		raise(signo);
}

/* Called for every image opened, because others (faulthandler) install theirs at any time. */
static int port_install_sigbus(void)
{
	struct sigaction now, ours;
	if (sigaction(SIGBUS, NULL, &now))
		return -errno;
	if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == port_on_sigbus)
		return 0;
	memset(&ours, 0, sizeof ours);
	ours.sa_sigaction = port_on_sigbus;
	ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
	sigemptyset(&ours.sa_mask);
	port_next_sigbus = now;
	return sigaction(SIGBUS, &ours, NULL) ? -errno : 0;
}

/* Copy past the cache, for data that nobody reads soon: no line of the target is fetched first.
 * The stores are weakly ordered; port_stream_end() puts them before whatever follows. */
static inline void port_stream(char *target, const char *source, size_t size)
{
#ifdef __SSE2__
	size_t head = -(uintptr_t)target & 15;
	if (size >= 256) {
		memcpy(target, source, head);
		target += head;
		source += head;
		size -= head;
		for (; size >= 64; target += 64, source += 64, size -= 64) {
			__m128i a = _mm_loadu_si128((const __m128i *)source);
			__m128i b = _mm_loadu_si128((const __m128i *)(source + 16));
			__m128i c = _mm_loadu_si128((const __m128i *)(source + 32));
			__m128i d = _mm_loadu_si128((const __m128i *)(source + 48));
			_mm_stream_si128((__m128i *)target, a);
			_mm_stream_si128((__m128i *)(target + 16), b);
			_mm_stream_si128((__m128i *)(target + 32), c);
			_mm_stream_si128((__m128i *)(target + 48), d);
		}
	}
#endif
	memcpy(target, source, size);
}

static inline void port_stream_end(void)
{
#ifdef __SSE2__
	_mm_sfence();
#endif
}

#define PORT_GUARDED(access)                                                   \
	sigjmp_buf here, *outer = port_guard;                                  \
	if (sigsetjmp(here, 0)) {                                              \
		port_guard = outer;                                            \
		return -EIO;                                                   \
	}                                                                      \
	port_guard = &here;                                                    \
	__asm__ volatile("" ::: "memory");                                     \
	access;                                                                \
	__asm__ volatile("" ::: "memory");                                     \
	port_guard = outer;                                                    \
	return 0

static __attribute__((noinline)) int port_copy(void *target, const void *source, size_t size)
{
	PORT_GUARDED(memcpy(target, source, size));
}

static __attribute__((noinline)) int port_copy_stream(void *target, const void *source, size_t size)
{
	PORT_GUARDED(port_stream(target, source, size));
}

static __attribute__((noinline)) int port_zero(void *target, size_t size)
{
	PORT_GUARDED(memset(target, 0, size));
}

static inline void port_prefetch(const void *address)
{
	__builtin_prefetch(address, 0, 2);
}

/* Atomics: entries of an exception table are read by holders of the shared lock while the
 * holder of the prepare mutex reserves others; counters are printed without a lock. */
static inline uint64_t port_load64(const uint64_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline void port_store64(uint64_t *p, uint64_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

static inline void port_or64(uint64_t *p, uint64_t bits)
{
	__atomic_fetch_or(p, bits, __ATOMIC_RELEASE);
}

static inline uint64_t port_lowest_bit(uint64_t v)
{
	return (uint64_t)__builtin_ctzll(v);
}

static inline uint32_t port_load32(const uint32_t *p)
{
	return __atomic_load_n(p, __ATOMIC_ACQUIRE);
}

static inline void port_store32(uint32_t *p, uint32_t v)
{
	__atomic_store_n(p, v, __ATOMIC_RELEASE);
}

/* The kernel orders what passes through a FUSE mount: a request comes after whatever its caller has
 * done before, and after the answer comes whatever the caller does next. Where caller and server
 * are threads of one process, as in the tests, the thread sanitizer does not see that; so it is
 * told where others use a device, and where a request has come and is answered. */
#ifdef __SANITIZE_THREAD__
void __tsan_acquire(void *address);
void __tsan_release(void *address);
static char port_asked, port_answered;

static inline void port_use_begins(void) { __tsan_acquire(&port_answered); }
static inline void port_use_ends(void) { __tsan_release(&port_asked); }
static inline void port_fuse_request(void)
{
	__tsan_acquire(&port_asked);
	__tsan_acquire(&port_answered);
}
static inline void port_fuse_answer(void) { __tsan_release(&port_answered); }
#else
static inline void port_use_begins(void) {}
static inline void port_use_ends(void) {}
static inline void port_fuse_request(void) {}
static inline void port_fuse_answer(void) {}
#endif

/* Big-endian numbers of the wire, at any address. */
static inline uint64_t port_get_be(const uint8_t *p, int size)
{
	uint64_t value = 0;
	for (int i = 0; i < size; i++)
		value = value << 8 | p[i];
	return value;
}

static inline void port_put_be(uint8_t *p, int size, uint64_t value)
{
	for (int i = size - 1; i >= 0; i--, value >>= 8)
		p[i] = (uint8_t)value;
}

/* On disk everything is little-endian; memory is on every machine this builds for. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the COW store is little-endian");

/* A reader-writer lock for data that is read by everybody all the time and written seldom.
 * Each reader counts itself in one of several slots, each on a cache line of its own, so readers
 * on different cores do not meet. A writer raises the flag and waits until every slot is empty;
 * readers that see the flag step back and wait. Writers go first. Not recursive. */
#define PORT_SLOTS 16

struct port_slot {
	uint32_t readers;
	char pad[60];
};

typedef struct port_rwlock {
	struct port_slot slot[PORT_SLOTS];
	uint32_t writing;
	pthread_mutex_t turn;    /* held by the writer, from lock to unlock */
	pthread_mutex_t mutex;   /* for the two conditions */
	pthread_cond_t drained;  /* a reader left while a writer waits */
	pthread_cond_t released; /* the writer left */
} port_rwlock;

static uint32_t port_next_slot;
static __thread uint32_t port_my_slot __attribute__((tls_model("initial-exec")));

static inline uint32_t port_slot_index(void)
{
	uint32_t n;
	if (!port_my_slot) {
		n = __atomic_fetch_add(&port_next_slot, 1, __ATOMIC_RELAXED);
		port_my_slot = 1 + n % PORT_SLOTS;
	}
	return port_my_slot - 1;
}

static void port_rwlock_init(port_rwlock *l)
{
	memset(l, 0, sizeof *l);
	pthread_mutex_init(&l->turn, NULL);
	pthread_mutex_init(&l->mutex, NULL);
	pthread_cond_init(&l->drained, NULL);
	pthread_cond_init(&l->released, NULL);
}

static void port_rwlock_destroy(port_rwlock *l)
{
	pthread_cond_destroy(&l->released);
	pthread_cond_destroy(&l->drained);
	pthread_mutex_destroy(&l->mutex);
	pthread_mutex_destroy(&l->turn);
}

static inline void port_read_unlock(port_rwlock *l)
{
	__atomic_fetch_sub(&l->slot[port_slot_index()].readers, 1, __ATOMIC_SEQ_CST);
	if (__builtin_expect(__atomic_load_n(&l->writing, __ATOMIC_SEQ_CST), 0)) {
		pthread_mutex_lock(&l->mutex);
		pthread_cond_signal(&l->drained);
		pthread_mutex_unlock(&l->mutex);
	}
}

static inline void port_read_lock(port_rwlock *l)
{
	for (;;) {
		__atomic_fetch_add(&l->slot[port_slot_index()].readers, 1, __ATOMIC_SEQ_CST);
		if (__builtin_expect(!__atomic_load_n(&l->writing, __ATOMIC_SEQ_CST), 1))
			return;
		port_read_unlock(l);
		pthread_mutex_lock(&l->mutex);
		while (__atomic_load_n(&l->writing, __ATOMIC_SEQ_CST))
			pthread_cond_wait(&l->released, &l->mutex);
		pthread_mutex_unlock(&l->mutex);
	}
}

static inline uint32_t port_readers(const port_rwlock *l)
{
	uint32_t sum = 0;
	for (int i = 0; i < PORT_SLOTS; i++)
		sum += __atomic_load_n(&l->slot[i].readers, __ATOMIC_SEQ_CST);
	return sum;
}

static void port_write_lock(port_rwlock *l)
{
	pthread_mutex_lock(&l->turn);
	pthread_mutex_lock(&l->mutex);
	__atomic_store_n(&l->writing, 1, __ATOMIC_SEQ_CST);
	while (port_readers(l))
		pthread_cond_wait(&l->drained, &l->mutex);
	pthread_mutex_unlock(&l->mutex);
}

static void port_write_unlock(port_rwlock *l)
{
	pthread_mutex_lock(&l->mutex);
	__atomic_store_n(&l->writing, 0, __ATOMIC_SEQ_CST);
	pthread_cond_broadcast(&l->released);
	pthread_mutex_unlock(&l->mutex);
	pthread_mutex_unlock(&l->turn);
}

static uint64_t port_microseconds(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* A counter others wait on: device events, the mapper's changes, merge steps.
 *
 * No mutex: whoever is woken would only queue for it. A raise counts first and then looks for
 * waiters; a waiter says that it is there and then looks at the count, and the kernel once more.
 */
typedef struct port_event {
	uint64_t count;
	uint32_t waiters;
} port_event;

static void port_event_init(port_event *e)
{
	e->count = 0;
	e->waiters = 0;
}

static uint64_t port_event_count(port_event *e)
{
	return __atomic_load_n(&e->count, __ATOMIC_SEQ_CST);
}

/* The half of the count that the kernel compares; 2^32 raises do not happen in between. */
static uint32_t *port_event_futex(port_event *e)
{
	return (uint32_t *)&e->count + (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__);
}

static void port_event_raise(port_event *e)
{
	__atomic_fetch_add(&e->count, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&e->waiters, __ATOMIC_SEQ_CST))
		syscall(SYS_futex, port_event_futex(e), FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* Wait until the count differs from `seen` or `microseconds` have passed; return the count. */
static uint64_t port_event_wait(port_event *e, uint64_t seen, uint64_t microseconds)
{
	struct timespec until;
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += (time_t)(microseconds / 1000000);
	until.tv_nsec += (long)(microseconds % 1000000) * 1000L;
	if (until.tv_nsec >= 1000000000L) {
		until.tv_nsec -= 1000000000L;
		until.tv_sec++;
	}
	__atomic_fetch_add(&e->waiters, 1, __ATOMIC_SEQ_CST);
	while (port_event_count(e) == seen)
		if (syscall(SYS_futex, port_event_futex(e), FUTEX_WAIT_BITSET_PRIVATE,
			    (uint32_t)seen, &until, NULL, FUTEX_BITSET_MATCH_ANY) &&
		    errno == ETIMEDOUT)
			break;
	__atomic_fetch_sub(&e->waiters, 1, __ATOMIC_SEQ_CST);
	return port_event_count(e);
}

#endif
