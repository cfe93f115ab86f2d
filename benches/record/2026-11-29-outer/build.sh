# build.sh KERNELS SET MIB: builds and runs steps.cpp with the headers in the folder KERNELS, for avx2
# or avx512, with so many MiB of parameters a rank.
flags="-mavx2 -mf16c -mfma"
[ "$2" = avx512 ] && flags="-mavx512f -mavx512bw -mavx512vl -mavx512dq $flags"
g++ -O3 -std=c++17 -ffp-contract=off -fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math \
  "-DPA_ISA=$2" $flags "-I$1" "$(dirname "$0")/steps.cpp" -o "/tmp/steps-$2" && "/tmp/steps-$2" "$3"
