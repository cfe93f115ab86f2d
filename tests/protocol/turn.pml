/* Taking turns by loads and stores (take_turn in kernels/mailbox.h), for spin: N ranks write one word in turn, and any of
 * them may die anywhere, which the others are told after its last store. tests/model.rs runs it. Two turns at once, a word
 * written twice, and a rank that waits for ever are errors. FAULT plants one mistake; spin must find each.
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

#define TURNS 2

bit deciding[N], gone[N];
byte word;    /* the turn that it was last written in */
byte holders; /* what the model checks: ranks in their turn, dead ones aside */

#define has_turn(q) (deciding[q] && !(gone[q] && !DEAD_KEEP_TURN))
#ifdef HEALTHY
#define may_die skip
#else
#define may_die if :: skip :: goto dead fi
#endif

proctype Rank(byte r) {
  byte turn = 1, q;
  bit first, holds;
  do
  :: turn > TURNS -> break
  :: else ->
    first = 0;
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
            fi
          :: else
          fi
        fi;
        q++
      od;
      if :: LOOKS_FIRST -> deciding[r] = 1 :: else fi
    od;
    skip; /* spin does not jump into a d_step */
    d_step { assert(holders == 0); holders++; holds = 1 };
    may_die;
    if
    :: word < turn || WORD_NOT_LOOKED_AT -> d_step { assert(word < turn); word = turn }
    :: else
    fi;
    may_die;
    d_step { holders--; holds = 0 };
    deciding[r] = 0;
next_turn:
    turn++
  od;
  goto done;
dead:
  skip;
  d_step { holders = holders - holds; holds = 0 };
  gone[r] = 1; /* told later than its last store */
done:
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
