/* What the operations' cpu.c have in common. */

#include <stdint.h>
#include <string.h>

/* On x86-64, GCC compiles a function twice: for processors with AVX2 (before GCC 12 without fused multiply-adds) and
   for all others. Clang, which before 18 would rename the function, compiles it once. */
#if !defined(__x86_64__) || !defined(__GLIBC__) || defined(__clang__)
#define FOR_EACH_PROCESSOR
#elif __GNUC__ >= 12
#define FOR_EACH_PROCESSOR __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx2", "default")))
#endif

#define INLINE static inline __attribute__((always_inline))

/* Fewer numbers are not worth a second thread; PyTorch draws the line there too. */
#define NUMBERS_FOR_THREADS 32768
