/* One rank of an MPI peer: averages GPT-2's tensors and writes its measurements to DIR/rank-R.json.
 *
 *     rank_mpi per_tensor|flattened SIZES WARM-UPS REPETITIONS RANKS DIR
 *
 * SIZES is a file with the number of elements of each tensor, one per line. The tensors are filled
 * and checked as in rank_torch.py. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { PERIOD = 61, MOST = 1024 };

static float *tensors[MOST], *flat;
static size_t sizes[MOST], elements;
static int count, rank, ranks;

static void fail(const char *what) {
    fprintf(stderr, "rank_mpi: %s\n", what);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

static float *allocate(size_t n) {
    float *memory = aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64);
    if (!memory) fail("out of memory");
    return memory;
}

static void fill(void) {
    for (int i = 0; i < count; i++)
        for (size_t j = 0; j < sizes[i]; j++)
            tensors[i][j] = (float)((31 * i + j) % PERIOD + 8 * rank);
}

/* Number of elements that are not the mean. */
static size_t wrong(void) {
    size_t bad = 0;
    for (int i = 0; i < count; i++)
        for (size_t j = 0; j < sizes[i]; j++)
            bad += tensors[i][j] != (float)((31 * i + j) % PERIOD + 4 * (ranks - 1));
    return bad;
}

/* Multiplies while copying. */
static void scale(float *restrict to, const float *restrict from, size_t n, float factor) {
    for (size_t j = 0; j < n; j++) to[j] = from[j] * factor;
}

static void sum(float *data, size_t n) { /* an error ends the program by default */
    MPI_Allreduce(MPI_IN_PLACE, data, (int)n, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
}

static void per_tensor(void) {
    for (int i = 0; i < count; i++) {
        sum(tensors[i], sizes[i]);
        for (size_t j = 0; j < sizes[i]; j++) tensors[i][j] *= 1.0f / ranks;
    }
}

/* Through a flat buffer that is reused, with the multiplication in the copy back. */
static void flattened(void) {
    float *at = flat;
    for (int i = 0; i < count; at += sizes[i++]) memcpy(at, tensors[i], sizes[i] * sizeof(float));
    sum(flat, elements);
    at = flat;
    for (int i = 0; i < count; at += sizes[i++]) scale(tensors[i], at, sizes[i], 1.0f / ranks);
}

/* A field of /proc/self/status, in KiB. */
static long memory(const char *field) {
    char line[256];
    long kib = -1;
    FILE *file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, field, strlen(field))) kib = atol(line + strlen(field) + 1);
    if (file) fclose(file);
    if (kib < 0) fail("/proc/self/status lacks memory fields");
    return kib;
}

/* Resets VmHWM to the resident size. */
static void reset_peak(void) {
    FILE *file = fopen("/proc/self/clear_refs", "w");
    if (!file || fputs("5", file) < 0 || fclose(file)) fail("can't reset VmHWM");
}

static long long now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    if (argc != 7) fail("METHOD SIZES WARM-UPS REPETITIONS RANKS DIR");
    if (ranks != atoi(argv[5])) fail("the world size is not RANKS");
    int is_flattened = !strcmp(argv[1], "flattened");
    int warmups = atoi(argv[3]), all = warmups + atoi(argv[4]);
    if (!is_flattened && strcmp(argv[1], "per_tensor")) fail("unknown method");

    FILE *file = fopen(argv[2], "r");
    if (!file) fail("can't read the sizes");
    for (size_t n; count < MOST && fscanf(file, "%zu", &n) == 1; elements += n) {
        tensors[count] = allocate(n);
        sizes[count++] = n;
    }
    fclose(file);
    fill();
    long before = memory("VmRSS");
    if (is_flattened) memset(flat = allocate(elements), 0, elements * sizeof(float));
    MPI_Barrier(MPI_COMM_WORLD);

    char path[4096];
    snprintf(path, sizeof path, "%s/rank-%d.json", argv[6], rank);
    if (!(file = fopen(path, "w"))) fail("can't write to DIR");
    fprintf(file, "{\"ranks\": %d, \"threads\": 1, \"samples\": [", ranks);
    size_t bad = 0;
    long peak = 0;
    for (int i = 0; i < all; i++) {
        fill();
        reset_peak();
        MPI_Barrier(MPI_COMM_WORLD);
        long long start = now();
        if (is_flattened) flattened(); else per_tensor();
        long long end = now();
        long high = memory("VmHWM");
        peak = high > peak ? high : peak;
        bad += wrong();
        if (i >= warmups) fprintf(file, "%s[%lld, %lld]", i > warmups ? ", " : "", start, end);
    }
    fprintf(file, "], \"wrong\": %zu, \"before\": %ld, \"peak\": %ld}\n", bad, before, peak);
    if (fclose(file)) fail("can't write to DIR");
    MPI_Finalize();
    return 0;
}
