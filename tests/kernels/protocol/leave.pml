/* Departure (poll_interrupt and is_lost in kernels/wait.h, publish_completed in
 * src/averager/outcome.rs), for spin: N ranks each make AVERAGES averages, in each of which they
 * wait for a word of every other, and depart. model.rs runs it.
 *
 *   HEALTHY     every rank must complete all averages, whichever has departed before
 *   otherwise   one rank may die, which the others learn after its last store, and one may be
 *               stopped for good, both anywhere: a rank that waits for the stopped one must end
 *               because of the dead one
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

#define DEPARTS_FIRST (FAULT == 1)     /* a rank departs before it publishes its completion */
#define LOOKS_EARLY (FAULT == 2)    /* `completed` is read before `departed` */
#define DEPARTED_IS_LOST (FAULT == 3)   /* a departed rank is missed, also if it has completed */
#define AWAITED_ONLY (FAULT == 4)   /* a rank polls only the awaited one */
#define NOT_READ_AGAIN (FAULT == 5) /* a word published just before a departure does not count */
#define COMPLETES_EARLY (FAULT == 6)  /* a rank publishes its completion too early */

#define MOST 3 /* ranks */

byte arrived[MOST], completed[MOST];
bit departed[MOST];
bit poisoned;

/* State of the model alone. */
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

#define died_in_it(l) (dead[l] && departed[l] && done[l] < epoch)
/* Sees a departed rank and has not looked yet whether it has completed. */
#define hears_of(l) (!AWAITED_ONLY && l < N && l != r && departed[l] && !(looked >> l & 1))

inline misses(l) {
  assert(dead[l] || done[l] < epoch);
  poisoned = 1;
  goto end
}
inline look(l) {
  if
  :: !DEPARTED_IS_LOST && (LOOKS_EARLY -> early >> (2 * l) & 3 : completed[l]) >= epoch ->
    looked = looked | 1 << l
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
    if :: COMPLETES_EARLY -> completed[r] = epoch :: else fi;
    q = 0;
    do
    :: q == N -> break
    :: else ->
      may_fail;
      looked = 0;
      if :: LOOKS_EARLY -> early = completed[0] | completed[1] << 2 | completed[2] << 4 :: else fi;
      do
      :: arrived[q] >= epoch -> break
      :: poisoned -> goto end
      :: q != r && departed[q] ->
        if :: !NOT_READ_AGAIN && arrived[q] >= epoch -> break :: else -> misses(q) fi
      :: hears_of(0) -> look(0)
      :: hears_of(1) -> look(1)
      :: hears_of(2) -> look(2)
      /* The deadline. With a dead rank it must not come to that. */
      :: somebody_stopped && !died_in_it(0) && !died_in_it(1) && !died_in_it(2) ->
        poisoned = 1;
        goto end
      od;
      q++
    od;
    done[r] = epoch;
    if :: DEPARTS_FIRST && epoch == AVERAGES -> departed[r] = 1 :: else fi;
    may_fail;
    completed[r] = epoch
  od;
dies:
  departed[r] = 1;
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
