# build.sh KERNELS SET [-DOLD]: builds and runs convert.cpp with the headers in the folder KERNELS,
# for avx2 or avx512. -DOLD: headers of 1145aae or older.
flags="-mavx2 -mf16c -mfma"
[ "$2" = avx512 ] && flags="-mavx512f -mavx512bw -mavx512vl -mavx512dq $flags"
g++ -O3 -std=c++17 -ffp-contract=off -fno-exceptions -fno-rtti -fno-math-errno -fno-trapping-math \
  "-DPA_ISA=$2" $flags $3 "-I$1" "$(dirname "$0")/convert.cpp" -o /tmp/convert && /tmp/convert
