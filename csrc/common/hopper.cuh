// PTX of sm_90a without torch: barriers in shared memory, the copy engine (TMA), warpgroup products (wgmma). Each
// beside its meaning, which tests/cuda_emulator/hopper_emulator.h gives where a CPU's compiler reads this.
//
// Words: a warpgroup is 4 warps, the first a multiple of 4. The copy engine and wgmma read and write shared memory past
// the path of ordinary loads and stores: what a thread has written must pass fence_async() before they read it.
#pragma once
#include "device.cuh"

#if defined(__CUDACC__)
#include <cuda.h>
#else
#include "hopper_emulator.h"  // of tests/cuda_emulator
#endif

// Kernels for all architectures use what is marked so: before sm_90 it does nothing.
#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
#define N3_FROM_SM90 0
#else
#define N3_FROM_SM90 1
#endif

namespace n3::hopper {

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = ::emulator::TensorMap;
#endif

// Dynamic shared memory of the block, at a multiple of 1024: the longest swizzle pattern begins there.
N3_DEVICE char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) char memory[];
  return memory;
#else
  return ::emulator::own_shared_memory();
#endif
}

N3_DEVICE uint32_t shared_address(const void* p) {
#if defined(__CUDACC__)
  return uint32_t(__cvta_generic_to_shared(p));
#else
  return uint32_t(static_cast<const char*>(p) - ::emulator::own_shared_memory());
#endif
}

// ---- barriers in shared memory

// Completes a phase when `arrivals` threads have arrived and all bytes that they announced have been copied.
using Barrier = uint64_t;

N3_DEVICE void init_barrier(Barrier* barrier, uint32_t arrivals) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#else
  ::emulator::init_barrier(barrier, arrivals);
#endif
}

// By the thread that has initialised barriers, before the __syncthreads after which others use them.
N3_DEVICE void publish_barriers() {
#if defined(__CUDACC__)
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

N3_DEVICE void arrive(Barrier* barrier) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  ::emulator::arrive(barrier, 0);
#endif
}

// Arrives, and announces bytes that the copy engine will write.
N3_DEVICE void arrive_expecting(Barrier* barrier, uint32_t bytes) {
#if defined(__CUDACC__)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  ::emulator::arrive(barrier, bytes);
#endif
}

// Waits for the completion of the phase of this parity: 0 for the first, 1 for the second, 0 for the third ... Of a new
// barrier the phase before the first, of parity 1, counts as complete.
N3_DEVICE void wait(Barrier* barrier, uint32_t parity) {
#if defined(__CUDACC__)
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#else
  ::emulator::wait(barrier, parity);
#endif
}

// A barrier of kThreads threads, whole warps; `id` 1..15 is its own.
template <int kThreads>
N3_DEVICE void sync_threads(int id) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
#else
  ::emulator::sync_named(id, kThreads);
#endif
}
N3_DEVICE void sync_warpgroup(int id) { sync_threads<128>(id); }

N3_DEVICE void fence_async() {
#if defined(__CUDACC__)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Registers per thread from here on, for all four warps of a warpgroup: multiples of 8 from 24 to 240.
template <int kRegisters>
N3_DEVICE void give_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
N3_DEVICE void take_registers() {
#if defined(__CUDACC__)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// ---- clusters: blocks that run at once and read each other's shared memory

// For all threads of the cluster; also orders what they wrote to shared memory. Not before sm_90.
N3_DEVICE void sync_cluster() {
#if N3_FROM_SM90
  __syncwarp();  // aligned: a warp that comes out of a divergent loop must be whole again
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#elif defined(__CUDACC__)
  __trap();
#else
  ::emulator::wait_at(::emulator::Thread::kAtCluster);
#endif
}

// What block `rank` of the cluster has where this one has p. Not before sm_90.
N3_DEVICE float4 read_cluster(const float4* p, int rank) {
#if N3_FROM_SM90
  float4 v;
  asm volatile(
      "{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [a];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return v;
#elif defined(__CUDACC__)
  __trap();
#else
  const char* there = reinterpret_cast<const char*>(p) - ::emulator::own_shared_memory() + ::emulator::shared_memory;
  return *reinterpret_cast<const float4*>(there + rank * ::emulator::kSharedBytes);
#endif
}

// ---- kernels that overlap (programmatic dependent launch)

// The next kernel of the stream may start, if it was launched so, and wait at wait_for_previous().
N3_DEVICE void let_next_start() {
#if N3_FROM_SM90
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernels before have ended and what they wrote is there: before it, nothing that they may write is read and
// nothing that they may read is written.
N3_DEVICE void wait_for_previous() {
#if N3_FROM_SM90
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings `bytes` at p, both multiples of 16, to L2: harmless whatever the kernels before write there.
N3_DEVICE void prefetch_bytes(const void* p, uint32_t bytes) {
#if N3_FROM_SM90
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#elif !defined(__CUDACC__)
  ::emulator::prefetch(p, bytes);
#endif
}

// ---- counters of blocks that have come to a point, in global memory

// Whether this is the last of `arrivals` on a counter, which then is zero again. What the block wrote before a barrier
// that this thread has passed is seen by all threads of the last one's block behind a barrier that follows.
N3_DEVICE bool is_last(uint32_t* counter, uint32_t arrivals) {
#if defined(__CUDACC__)
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(arrivals - 1)
               : "memory");
#else
  const uint32_t before = *counter;
  *counter = before >= arrivals - 1 ? 0 : before + 1;
#endif
  return before == arrivals - 1;
}

// ---- copies of tiles

// By one thread: the box of `map` at these coordinates, innermost first, to shared memory; what lies outside the tensor
// becomes zero. The barrier was told of the box's bytes.
N3_DEVICE void load_tile(void* to, const TensorMap* map, Barrier* barrier, int c0, int c1, int c2, int c3) {
#if defined(__CUDACC__)
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(shared_address(to)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
#else
  ::emulator::load_tile(to, *map, barrier, c0, c1, c2, c3);
#endif
}

N3_DEVICE void prefetch_map(const TensorMap* map) {
#if defined(__CUDACC__)
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
#endif
}

// ---- warpgroup products

// How a tile of 16-bit elements lies in shared memory: in rows of kBytes (128 or 32), swizzled, at a multiple of 1024.
//   along K: a row holds 64 or 16 neighbouring k of one m or n
//   along MN: a row holds 64 or 16 neighbouring m or n of one k
enum class Major { kK = 0, kMN = 1 };

// Descriptor of such a tile. `next_rows`: bytes from eight rows to the next eight; `next_block`: along MN, from a block
// of columns as long as a row to the next. A step of 16 in k adds, along K, 32 bytes to `start`, along MN 16 rows.
template <int kBytes>
N3_DEVICE uint64_t descriptor(const void* start, uint32_t next_rows, uint32_t next_block) {
  static_assert(kBytes == 128 || kBytes == 32);
  constexpr uint64_t kSwizzle = kBytes == 128 ? 1 : 3;
  return (shared_address(start) & 0x3ffff) >> 4 | uint64_t(next_block >> 4) << 16 | uint64_t(next_rows >> 4) << 32 |
         kSwizzle << 62;
}

// Between ordinary accesses to the registers of a product, or the first product, and the next product.
N3_DEVICE void fence_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products.
N3_DEVICE void commit_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  ::emulator::commit_products();
#endif
}

// Waits until at most kPending of the latest groups are under way.
template <int kPending>
N3_DEVICE void wait_products() {
#if defined(__CUDACC__)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#else
  ::emulator::wait_products(kPending);
#endif
}

// Keeps the compiler from moving accesses to a product's registers across this point.
template <int kCount>
N3_DEVICE void pin(float (&d)[kCount]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// The same for an operand in registers: what is written to it must come before fence_products().
template <int kCount>
N3_DEVICE void pin(uint32_t (&a)[kCount]) {
#if defined(__CUDACC__)
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(a[i])::"memory");
#endif
}

// The same value, of which the compiler does not know it: what follows from it is computed anew instead of kept in
// registers.
N3_DEVICE int forgotten(int v) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// d = a b, or d += a b where `accumulate`: a [64, 16], b [16, kN], d [64, kN], for one warpgroup. With g = lane / 4 and
// t = lane % 4 a thread of warp w holds d[4 j ..] = rows 16 w + g, columns 8 j + 2 t, + 1, then the same of row + 8.
// `a` lies in shared memory, or in registers as in mma_m16n8k16: (g, 2t..2t+1), (g + 8, same), (g, 2t+8..2t+9),
// (g + 8, same) of the warp's 16 rows. The specialisations below are one for each type and width in use.
template <typename T, int kN>
struct Product;

#if defined(__CUDACC__)
#define N3_OUT8(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define N3_LIST8 "{%0, %1, %2, %3}, "
#define N3_SHARED8 "%4, %5, p, 1, 1, %7, %8;\n}"
#define N3_SHARED_FLAG8 "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
#define N3_REGISTERS8 "{%4, %5, %6, %7}, %8, p, 1, 1, %10;\n}"
#define N3_REGISTERS_FLAG8 "{\n.reg .pred p;\nsetp.ne.b32 p, %9, 0;\n"
#define N3_OUT16(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define N3_LIST16 "{%0, %1, %2, %3, %4, %5, %6, %7}, "
#define N3_SHARED16 "%8, %9, p, 1, 1, %11, %12;\n}"
#define N3_SHARED_FLAG16 "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
#define N3_REGISTERS16 "{%8, %9, %10, %11}, %12, p, 1, 1, %14;\n}"
#define N3_REGISTERS_FLAG16 "{\n.reg .pred p;\nsetp.ne.b32 p, %13, 0;\n"
#define N3_OUT32(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define N3_LIST32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
#define N3_SHARED32 "%16, %17, p, 1, 1, %19, %20;\n}"
#define N3_SHARED_FLAG32 "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
#define N3_REGISTERS32 "{%16, %17, %18, %19}, %20, p, 1, 1, %22;\n}"
#define N3_REGISTERS_FLAG32 "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n"
#define N3_OUT64(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), \
  "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
  "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define N3_LIST64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}, "
#define N3_SHARED64 "%32, %33, p, 1, 1, %35, %36;\n}"
#define N3_SHARED_FLAG64 "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
#define N3_REGISTERS64 "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
#define N3_REGISTERS_FLAG64 "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
#define N3_OUT80(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), \
  "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), \
  "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), \
  "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define N3_LIST80 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39}, "
#define N3_SHARED80 "%40, %41, p, 1, 1, %43, %44;\n}"
#define N3_SHARED_FLAG80 "{\n.reg .pred p;\nsetp.ne.b32 p, %42, 0;\n"
#define N3_REGISTERS80 "{%40, %41, %42, %43}, %44, p, 1, 1, %46;\n}"
#define N3_REGISTERS_FLAG80 "{\n.reg .pred p;\nsetp.ne.b32 p, %45, 0;\n"
#define N3_OUT128(d) \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
  "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), \
  "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
  "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), \
  "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
  "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), \
  "+f"(d[63])
#define N3_LIST128 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63}, "
#define N3_SHARED128 "%64, %65, p, 1, 1, %67, %68;\n}"
#define N3_SHARED_FLAG128 "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
#define N3_REGISTERS128 "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
#define N3_REGISTERS_FLAG128 "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"

#define N3_PRODUCT(T, type, n)                                                                                       \
  template <>                                                                                                        \
  struct Product<device::T, n> {                                                                                     \
    template <Major kA, Major kB>                                                                                    \
    N3_DEVICE static void shared(float (&d)[n / 2], uint64_t a, uint64_t b, bool accumulate) {                       \
      asm volatile(N3_SHARED_FLAG##n "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type " " N3_LIST##n \
                   N3_SHARED##n                                                                                      \
                   : N3_OUT##n(d)                                                                                    \
                   : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kA)), "n"(int(kB)));                              \
    }                                                                                                                \
    template <Major kB>                                                                                              \
    N3_DEVICE static void registers(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {        \
      asm volatile(N3_REGISTERS_FLAG##n "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." #type "." #type            \
                   " " N3_LIST##n N3_REGISTERS##n                                                                    \
                   : N3_OUT##n(d)                                                                                    \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kB)));        \
    }                                                                                                                \
  };
N3_PRODUCT(BF16, bf16, 8)
N3_PRODUCT(BF16, bf16, 16)
N3_PRODUCT(BF16, bf16, 32)
N3_PRODUCT(BF16, bf16, 64)
N3_PRODUCT(BF16, bf16, 80)
N3_PRODUCT(BF16, bf16, 128)
N3_PRODUCT(F16, f16, 64)
N3_PRODUCT(F16, f16, 80)
N3_PRODUCT(F16, f16, 128)
#undef N3_PRODUCT
#undef N3_OUT8
#undef N3_LIST8
#undef N3_SHARED8
#undef N3_SHARED_FLAG8
#undef N3_REGISTERS8
#undef N3_REGISTERS_FLAG8
#undef N3_OUT16
#undef N3_LIST16
#undef N3_SHARED16
#undef N3_SHARED_FLAG16
#undef N3_REGISTERS16
#undef N3_REGISTERS_FLAG16
#undef N3_OUT32
#undef N3_LIST32
#undef N3_SHARED32
#undef N3_SHARED_FLAG32
#undef N3_REGISTERS32
#undef N3_REGISTERS_FLAG32
#undef N3_OUT64
#undef N3_LIST64
#undef N3_SHARED64
#undef N3_SHARED_FLAG64
#undef N3_REGISTERS64
#undef N3_REGISTERS_FLAG64
#undef N3_OUT80
#undef N3_LIST80
#undef N3_SHARED80
#undef N3_SHARED_FLAG80
#undef N3_REGISTERS80
#undef N3_REGISTERS_FLAG80
#undef N3_OUT128
#undef N3_LIST128
#undef N3_SHARED128
#undef N3_SHARED_FLAG128
#undef N3_REGISTERS128
#undef N3_REGISTERS_FLAG128
#else
template <typename T, int kN>
struct Product {
  template <Major kA, Major kB>
  static void shared(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
    ::emulator::product<T, kN>(d, ::emulator::operand(a, kA == Major::kMN), b, kB == Major::kMN, accumulate);
  }
  template <Major kB>
  static void registers(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    ::emulator::product<T, kN>(d, ::emulator::operand(a), b, kB == Major::kMN, accumulate);
  }
};
#endif

}  // namespace n3::hopper
