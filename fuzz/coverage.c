/* Hand what GCC's -fsanitize-coverage=trace-pc,trace-cmp calls to the libFuzzer inside Atheris.
 *
 * libFuzzer wants an array of 8-bit counters, as clang lays one out. GCC only calls a function at
 * every edge, so the return address picks one of a fixed number of counters here. All else is
 * passed on as it is: libasan, which is preloaded too, has functions of the same names that do
 * nothing, and would catch those calls of the extension, and of Atheris for Python code as well.
 * So this library comes first in LD_PRELOAD. main.py calls fuzz_coverage_begin().
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stddef.h>

#define SHIFT 17 /* ten times the edges that the extension has */
#define COUNTERS (1u << SHIFT)

uint8_t fuzz_counters[COUNTERS];
const unsigned fuzz_nr_counters = COUNTERS;
static uintptr_t places[2 * COUNTERS]; /* (address, flags) of each counter, as libFuzzer reads them */

void __sanitizer_cov_trace_pc(void)
{
	uint64_t address = (uintptr_t)__builtin_return_address(0);
	fuzz_counters[address * 0x9E3779B97F4A7C15u >> (64 - SHIFT)]++;
}

#define FUNCTIONS(EACH)                                                        \
	EACH(trace_cmp1, uint8_t, uint8_t)                                     \
	EACH(trace_cmp2, uint16_t, uint16_t)                                   \
	EACH(trace_cmp4, uint32_t, uint32_t)                                   \
	EACH(trace_cmp8, uint64_t, uint64_t)                                   \
	EACH(trace_const_cmp1, uint8_t, uint8_t)                               \
	EACH(trace_const_cmp2, uint16_t, uint16_t)                             \
	EACH(trace_const_cmp4, uint32_t, uint32_t)                             \
	EACH(trace_const_cmp8, uint64_t, uint64_t)                             \
	EACH(trace_switch, uint64_t, uint64_t *)                               \
	EACH(8bit_counters_init, uint8_t *, uint8_t *)                         \
	EACH(pcs_init, const uintptr_t *, const uintptr_t *)

#define FORWARD(name, first, second)                                           \
	static void (*to_##name)(first, second);                               \
	void __sanitizer_cov_##name(first a, second b)                         \
	{                                                                      \
		if (to_##name)                                                 \
			to_##name(a, b);                                       \
	}
FUNCTIONS(FORWARD)

/* libFuzzer has none for floating point. */
void __sanitizer_cov_trace_cmpf(float a, float b)
{
	(void)a, (void)b;
}

void __sanitizer_cov_trace_cmpd(double a, double b)
{
	(void)a, (void)b;
}

/* Begin to pass on to the library at `path`, which is loaded; 0, or -1 if it has no libFuzzer. */
int fuzz_coverage_begin(const char *path)
{
	void *fuzzer = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
	if (!fuzzer)
		return -1;
#define FIND(name, first, second)                                              \
	*(void **)&to_##name = dlsym(fuzzer, "__sanitizer_cov_" #name);        \
	if (!to_##name)                                                        \
		return -1;
	FUNCTIONS(FIND)
	for (size_t i = 0; i < COUNTERS; i++)
		places[2 * i] = (uintptr_t)&fuzz_counters[i];
	to_8bit_counters_init(fuzz_counters, fuzz_counters + COUNTERS);
	to_pcs_init(places, places + 2 * COUNTERS);
	return 0;
}
