/* Hand what GCC's -fsanitize-coverage=trace-pc,trace-cmp calls to the libFuzzer inside Atheris.
 *
 * libFuzzer wants an array of 8-bit counters, as clang lays one out. GCC only calls a function at
 * every edge, so the return address picks one of a fixed number of counters here. Comparisons are
 * passed on as they are. main.py names the library that holds libFuzzer in COW_LIBFUZZER; without
 * it, as in the tests, everything here does nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>

#define PLAIN __attribute__((no_sanitize_coverage))
#define SHIFT 15
#define COUNTERS (1u << SHIFT)

static uint8_t counters[COUNTERS];
static uintptr_t places[2 * COUNTERS]; /* (address, flags) of each counter, as libFuzzer reads them */

PLAIN void __sanitizer_cov_trace_pc(void)
{
	uint64_t address = (uintptr_t)__builtin_return_address(0);
	counters[address * 0x9E3779B97F4A7C15u >> (64 - SHIFT)]++;
}

#define COMPARISONS(EACH)                                                      \
	EACH(cmp1, uint8_t) EACH(cmp2, uint16_t)                               \
	EACH(cmp4, uint32_t) EACH(cmp8, uint64_t)                              \
	EACH(const_cmp1, uint8_t) EACH(const_cmp2, uint16_t)                   \
	EACH(const_cmp4, uint32_t) EACH(const_cmp8, uint64_t)

#define FORWARD(name, type)                                                    \
	static void (*on_##name)(type, type);                                  \
	PLAIN void __sanitizer_cov_trace_##name(type a, type b)                \
	{                                                                      \
		if (on_##name)                                                 \
			on_##name(a, b);                                       \
	}
COMPARISONS(FORWARD)

static void (*on_switch)(uint64_t, void *);

PLAIN void __sanitizer_cov_trace_switch(uint64_t value, void *cases)
{
	if (on_switch)
		on_switch(value, cases);
}

PLAIN void __sanitizer_cov_trace_cmpf(float a, float b)
{
	(void)a, (void)b;
}

PLAIN void __sanitizer_cov_trace_cmpd(double a, double b)
{
	(void)a, (void)b;
}

PLAIN __attribute__((constructor)) static void coverage_begin(void)
{
	const char *path = getenv("COW_LIBFUZZER");
	void *fuzzer = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
	void (*add_counters)(uint8_t *, uint8_t *);
	void (*add_places)(const uintptr_t *, const uintptr_t *);

	if (!fuzzer)
		return;
	*(void **)&add_counters = dlsym(fuzzer, "__sanitizer_cov_8bit_counters_init");
	*(void **)&add_places = dlsym(fuzzer, "__sanitizer_cov_pcs_init");
	if (!add_counters || !add_places)
		return;
#define FIND(name, type) *(void **)&on_##name = dlsym(fuzzer, "__sanitizer_cov_trace_" #name);
	COMPARISONS(FIND)
	*(void **)&on_switch = dlsym(fuzzer, "__sanitizer_cov_trace_switch");
	for (size_t i = 0; i < COUNTERS; i++)
		places[2 * i] = (uintptr_t)&counters[i];
	add_counters(counters, counters + COUNTERS);
	add_places(places, places + 2 * COUNTERS);
}
