/* Taking turns by loads and stores (take_turn in kernels/decision.h), for spin: N ranks write one word in turn, and any of
 * them may die anywhere, which the others are told after its last store. tests/model.rs runs it. Two turns at once, a word
 * written twice, and a rank that waits for ever are errors. FAULT plants one mistake; spin must find each.
 *
 * In half of the runs ranks are impatient, as they are on CPUs: a rank may be stopped for ever in its turn, which nobody is told,
 * so any rank may lose patience at any moment, also with one that was not stopped. Two turns at once are no error then, since
 * the word is written by compare-and-swap; but each turn still writes it once.
 */
#ifndef N
#define N 3
#endif
#ifndef FAULT
#define FAULT 0
#endif

#define LOOKS_FIRST (FAULT == 1)        /* a rank looks at the others before it raises its flag */
#define NO_WAY_GIVEN (FAULT == 2)       /* a rank does not give way to a lower one */
#define HIGHER_IGNORED (FAULT == 3)     /* a rank does not wait for higher ones */
#define LOWER_IGNORED (FAULT == 4)      /* a rank does not wait for lower ones */
#define DEAD_KEEP_TURN (FAULT == 5)     /* a rank that is gone is waited for */
#define WORD_NOT_LOOKED_AT (FAULT == 6) /* the word is written without a look at whether it was meanwhile */
#define PLAIN_STORE (FAULT == 7)        /* impatient ranks write the word by a store, not by a compare-and-swap */
#define STOPPED_KEEP_TURN (FAULT == 8)  /* nobody loses patience with a rank that was stopped */

#define TURNS 2

bit deciding[N], gone[N];
byte word;    /* the turn that it was last written in */
byte holders; /* what the model checks: ranks in their turn, dead ones aside */

bit impatient;

#define has_turn(q) (!tired && deciding[q] && !(gone[q] && !DEAD_KEEP_TURN))
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
    :: word >= turn -> deciding[r] = 0; goto next_turn /* over: no need for one */
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
      :: impatient && !PLAIN_STORE -> d_step { if :: word == seen -> assert(word < turn); word = turn :: else fi }
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
  gone[r] = 1; /* told later than its last store */
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
