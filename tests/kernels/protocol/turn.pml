/* The turn lock (take_turn in kernels/decision.h), for spin: N ranks write one word under a lock of
 * loads and stores, and any of them may die anywhere, which the others learn after its last store.
 * model.rs runs it. Two holders at once, a word written twice, and a rank that waits for ever
 * are errors. FAULT plants one mistake; spin must find each.
 *
 * In half of the runs ranks are impatient, as they are on CPUs: a rank may be stopped for ever
 * while it holds the lock, which the others never learn, so any rank may stop waiting at any
 * moment, also for one that was not stopped. Two holders at once are no error then, since the word
 * is written by compare-and-swap; but each turn still writes it once.
 */
#ifndef N
#define N 3
#endif
#ifndef FAULT
#define FAULT 0
#endif

#define LOOKS_FIRST (FAULT == 1)        /* a rank looks before it raises its flag */
#define NO_WAY_GIVEN (FAULT == 2)       /* a rank does not lower its flag for a lower one */
#define HIGHER_IGNORED (FAULT == 3)     /* a rank does not wait for higher ones */
#define LOWER_IGNORED (FAULT == 4)      /* a rank does not wait for lower ones */
#define DEAD_KEEP_TURN (FAULT == 5)     /* a departed rank is waited for */
#define WORD_NOT_LOOKED_AT (FAULT == 6) /* the word is not read again before it is written */
#define PLAIN_STORE (FAULT == 7)        /* impatient ranks write the word by a plain store */
#define STOPPED_KEEP_TURN (FAULT == 8)  /* ranks wait for a stopped one for ever */

#define TURNS 2

bit deciding[N], departed[N];
byte word;    /* the turn that wrote it last */
byte holders; /* state of the model alone: living ranks that hold the lock */

bit impatient;

#define has_turn(q) (!tired && deciding[q] && !(departed[q] && !DEAD_KEEP_TURN))
#ifdef HEALTHY
#define may_die skip
#define may_stop skip
#else
#define may_die if :: skip :: goto dead fi
#define may_stop if :: skip :: impatient -> goto end_stopped fi
#endif

proctype Rank(byte r) {
  byte turn = 1, q;
  byte seen;
  bit first, holds, tired;
  do
  :: turn > TURNS -> break
  :: else ->
    first = 0;
    tired = 0;
    do
    :: first -> break
    :: word >= turn -> deciding[r] = 0; goto next_turn /* over: the lock is not needed */
    :: else ->
      may_die;
      if :: !LOOKS_FIRST -> deciding[r] = 1 :: else fi;
      first = 1;
      q = 0;
      do
      :: q == N || !first -> break
      :: else ->
        may_die;
        if
        :: q == r || (q > r && HIGHER_IGNORED) || (q < r && LOWER_IGNORED) -> skip
        :: else ->
          if
          :: has_turn(q) ->
            if :: q < r -> first = 0; if :: !NO_WAY_GIVEN -> deciding[r] = 0 :: else fi :: else fi;
            if
            :: !has_turn(q)
            :: word >= turn -> deciding[r] = 0; goto next_turn
            :: impatient && !STOPPED_KEEP_TURN -> tired = 1
            fi
          :: else
          fi
        fi;
        q++
      od;
      if :: LOOKS_FIRST -> deciding[r] = 1 :: else fi
    od;
    skip; /* spin does not jump into a d_step */
    d_step { assert(holders == 0 || impatient); holders++; holds = 1 };
    seen = word;
    if
    :: seen < turn || WORD_NOT_LOOKED_AT ->
      may_die;
      may_stop;
      if
      :: impatient && !PLAIN_STORE ->
        d_step { if :: word == seen -> assert(word < turn); word = turn :: else fi }
      :: else -> d_step { assert(word < turn); word = turn }
      fi
    :: else
    fi;
    may_die;
    d_step { holders--; holds = 0; tired = 0; seen = 0; q = 0; first = 0 };
    deciding[r] = 0;
next_turn:
    turn++
  od;
  goto done;
dead:
  skip;
  d_step { holders = holders - holds; holds = 0 };
  departed[r] = 1; /* seen after its last store */
  goto done;
end_stopped:
  false; /* for ever */
done:
  skip
}

init {
  atomic {
    byte i;
    if :: impatient = 0 :: impatient = 1 fi;
    do
    :: i == N -> break
    :: else -> run Rank(i); i++
    od
  }
}
