/* Who goes and who is missed (trouble and is_lost in kernels/wait.h, say_through in src/averager/outcome.rs), for spin: N
 * ranks each make AVERAGES averages, in each of which they wait for a word of every other, and go. tests/model.rs runs it.
 *
 *   HEALTHY     every rank must come to the end of all averages, whoever has gone before it did
 *   otherwise   one rank may die, which the others are told after its last store, and one may be stopped for good, both
 *               anywhere: a rank that waits for the one that is stopped must end because of the one that is dead
 *
 * FAULT plants one mistake; spin must find each.
 */
#ifndef N
#define N 3
#endif
#ifndef AVERAGES
#define AVERAGES 2
#endif
#ifndef FAULT
#define FAULT 0
#endif

#define GONE_FIRST (FAULT == 1)     /* a rank is gone before it says that it is through */
#define LOOKS_EARLY (FAULT == 2)    /* a rank looks who is through before it looks who is gone */
#define GONE_IS_LOST (FAULT == 3)   /* a rank that is gone is missed, also if it was through */
#define AWAITED_ONLY (FAULT == 4)   /* a rank looks only at the one that it waits for */
#define NOT_READ_AGAIN (FAULT == 5) /* what a rank said just before it was gone does not count */
#define THROUGH_EARLY (FAULT == 6)  /* a rank says that it is through before it is */

#define MOST 3 /* ranks */

byte arrived[MOST], through[MOST];
bit gone[MOST];
bit poisoned;

/* What the model checks, and the protocol doesn't know. */
byte done[MOST];
bit dead[MOST], somebody_died, somebody_stopped;

#ifdef HEALTHY
#define may_fail skip
#else
#define may_fail \
  if \
  :: skip \
  :: atomic { !somebody_died -> somebody_died = 1; dead[r] = 1; goto dies } \
  :: atomic { !somebody_stopped -> somebody_stopped = 1; goto end } \
  fi
#endif

#define died_in_it(l) (dead[l] && gone[l] && done[l] < epoch)
/* Told of a rank that is gone, and has not looked yet whether it was through. */
#define hears_of(l) (!AWAITED_ONLY && l < N && l != r && gone[l] && !(looked >> l & 1))

inline misses(l) {
  assert(dead[l] || done[l] < epoch);
  poisoned = 1;
  goto end
}
inline look(l) {
  if
  :: !GONE_IS_LOST && (LOOKS_EARLY -> early >> (2 * l) & 3 : through[l]) >= epoch -> looked = looked | 1 << l
  :: else -> misses(l)
  fi
}

proctype Rank(byte r) {
  byte epoch, q, looked, early;
  do
  :: epoch == AVERAGES -> break
  :: else ->
    epoch++;
    may_fail;
    arrived[r] = epoch;
    if :: THROUGH_EARLY -> through[r] = epoch :: else fi;
    q = 0;
    do
    :: q == N -> break
    :: else ->
      may_fail;
      looked = 0;
      if :: LOOKS_EARLY -> early = through[0] | through[1] << 2 | through[2] << 4 :: else fi;
      do
      :: arrived[q] >= epoch -> break
      :: poisoned -> goto end
      :: q != r && gone[q] -> if :: !NOT_READ_AGAIN && arrived[q] >= epoch -> break :: else -> misses(q) fi
      :: hears_of(0) -> look(0)
      :: hears_of(1) -> look(1)
      :: hears_of(2) -> look(2)
      /* The deadline. With somebody dead it must not come to that. */
      :: somebody_stopped && !died_in_it(0) && !died_in_it(1) && !died_in_it(2) -> poisoned = 1; goto end
      od;
      q++
    od;
    done[r] = epoch;
    if :: GONE_FIRST && epoch == AVERAGES -> gone[r] = 1 :: else fi;
    may_fail;
    through[r] = epoch
  od;
dies:
  gone[r] = 1;
end:
  skip
}

init {
  atomic {
    byte i;
    do
    :: i == N -> break
    :: else -> run Rank(i); i++
    od
  }
}
