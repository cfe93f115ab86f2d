/* The mailbox protocol of kernels/ring.h with the all-or-nothing commit, for spin: N ranks of one
 * channel each make AVERAGES averages of ROUNDS rounds. Counters are modulo 8, and wrap. With
 * several channels the last block to have reduced votes for its rank; mutants 80 to 82 of
 * mutants.txt are about that. model.rs runs it.
 *
 *   HEALTHY     no rank dies and no deadline passes: every average must end, so that a deadlock is
 *               an error
 *   otherwise   at any wait a rank may give up (its deadline, an abort, a departed peer: kernels
 *               treat all alike), and at any step it may die
 *
 * A chunk carries its identity: average, round, shard, mean or partial sum, and the ranks in it.
 * FAULT plants one mistake, by the numbers below; spin must find each.
 */
#ifndef N
#define N 3
#endif
#ifndef ROUNDS
#define ROUNDS 1
#endif
#ifndef AVERAGES
#define AVERAGES 2
#endif
#ifndef FAULT
#define FAULT 0
#endif

#define CREDIT_OFF_BY_ONE (FAULT == 1)      /* the sender takes one slot more than there are */
#define DRAINED_EARLY (FAULT == 2)          /* a slot is freed before it was read */
#define FILLED_EARLY (FAULT == 3)           /* a slot is published before it was written */
#define NO_ROOM_CHECK (FAULT == 4)          /* the sender does not wait for room */
#define NUMBERS_NOT_WRAPPED (FAULT == 5)    /* counters are compared as numbers */
#define ONE_SLOT (FAULT == 6)               /* a mailbox of one slot */
#define NO_VOTE (FAULT == 7)                /* no rank waits for the votes */
#define BAD_VOTE_IGNORED (FAULT == 8)       /* a vote that says `non-finite` counts as a good one */
#define DECISION_NOT_CAS (FAULT == 9)       /* the last proposal is the decision */
#define GIVES_UP_UNASKED (FAULT == 10)      /* a rank gives up without reading the decision */
#define ONE_RECORD (FAULT == 11)            /* one record per rank, not two in turn */
#define NO_ENTRY_BARRIER (FAULT == 12)            /* the entry barrier skips the last rank */
#define ARRIVES_EARLY (FAULT == 13)         /* the arrival is published before the record */
#define VOTES_EARLY (FAULT == 14)           /* the vote is published before the reduce is done */
#define LATE_DECISION_COUNTS (FAULT == 15)  /* a decision about a later epoch ends this one */

#if ONE_SLOT
#define SLOTS 1
#else
#define SLOTS 2
#endif
#define START 6 /* of all counters: they wrap soon */

#define NEXT ((r + 1) % N)
#define PREVIOUS ((r + N - 1) % N)
#define ALL_RANKS ((1 << N) - 1)
#if NUMBERS_NOT_WRAPPED
#define REACHED(seen, want) (((seen) & 7) >= ((want) & 7))
#else
#define REACHED(seen, want) ((((seen) - (want)) & 7) < 4)
#endif
#define LATER(a, b) ((((a) - (b)) & 7) != 0 && (((a) - (b)) & 7) < 4)
#if CREDIT_OFF_BY_ONE
#define CREDIT (SLOTS + 1)
#else
#define CREDIT SLOTS
#endif
#if ONE_RECORD
#define RECORD(q) record[2 * (q)]
#else
#define RECORD(q) record[2 * (q) + (epoch & 1)]
#endif

/* average, mean or partial sum, round, shard, ranks in it */
#define CHUNK(mean, round_, shard_, ranks_) \
  ((number & 1) << 7 | (mean) << 6 | (round_) << 5 | (shard_) << 3 | (ranks_))

/* Outcomes of an average. */
#define OPEN 0
#define COMMITTED 1
#define REFUSED 2    /* at the entry barrier */
#define NON_FINITE 3 /* at the commit vote */
#define TIMEOUT 4    /* a rank gave up */

byte filled[N] = START, drained[N] = START; /* indexed by the rank that polls them */
byte box[N * SLOTS];
byte arrived[N] = START, vote[N] = (2 * START) & 7;
byte record[N * 2]; /* 2 · average, + 1: refuse */
byte decided_epoch = START, decided_kind = COMMITTED;

/* State of the model alone. */
byte good_votes[AVERAGES];
byte ending[AVERAGES]; /* outcome of the first rank that ended */
byte written[N];       /* bits by round and shard, in this average */

/* Moves the decision forward, or adopts it. */
inline decide(what) {
  atomic {
    if
    :: DECISION_NOT_CAS || LATER(epoch, decided_epoch) ->
      decided_epoch = epoch;
      decided_kind = what;
      kind = what
    :: else ->
      if
      :: decided_epoch == epoch || LATE_DECISION_COUNTS -> kind = decided_kind
      :: else -> kind = what /* a later epoch: this one ended as records and votes say */
      fi
    fi
  }
}
/* All ranks that end an average have the same outcome. */
inline ends(what) {
  d_step {
    assert(ending[number] == OPEN || ending[number] == what);
    ending[number] = what
  }
}
inline gives_up(awaited) {
  atomic {
    if
    :: committed -> goto departed /* elements are the mean or local; all know of the commit */
    :: else ->
      if
      :: GIVES_UP_UNASKED -> kind = TIMEOUT
      :: !GIVES_UP_UNASKED && (LATER(epoch, decided_epoch) || decided_epoch == epoch) ->
        decide(TIMEOUT)
      :: else -> kind = COMMITTED; if :: LATE_DECISION_COUNTS -> kind = decided_kind :: else fi
      fi;
      if
      :: kind == COMMITTED -> assert(awaited) /* others cannot have departed on without it */
      :: else -> ends(kind); goto departed
      fi
    fi
  }
}
#ifdef HEALTHY
#define await(awaited) awaited
#define may_die skip
#else
#define await(awaited) if :: awaited :: gives_up(awaited) fi
#define may_die if :: skip :: goto departed fi
#endif

/* One protocol step: enter and leave of mailbox.h, and the loop of ring.h between them. */
inline step(receives, expected, sends, sent) {
  may_die;
  if :: receives -> await(REACHED(filled[r], received + 1)) :: else fi;
  if :: sends && !NO_ROOM_CHECK -> await(REACHED(drained[r], sent_ + 1 - CREDIT)) :: else fi;
  if :: receives && DRAINED_EARLY -> drained[PREVIOUS] = (received + 1) & 7 :: else fi;
  if :: sends && FILLED_EARLY -> filled[NEXT] = (sent_ + 1) & 7 :: else fi;
  if :: receives -> assert(box[r * SLOTS + received % SLOTS] == (expected)) :: else fi;
  if :: sends -> box[NEXT * SLOTS + sent_ % SLOTS] = (sent) :: else fi;
  if :: sends -> sent_ = (sent_ + 1) & 7; filled[NEXT] = sent_ :: else fi;
  if :: receives -> received = (received + 1) & 7; drained[PREVIOUS] = received :: else fi
}
/* Own tensors change: all ranks must have agreed, and every chunk comes once. */
inline writes(shard_) {
  d_step {
    assert(good_votes[number] == N);
    assert((written[r] >> (round * N + (shard_)) & 1) == 0);
    written[r] = written[r] | 1 << (round * N + (shard_))
  }
}

inline votes() {
  d_step { vote[r] = (2 * epoch) & 7; good_votes[number] = good_votes[number] + 1 }
}

/* The ranks in shard s when it arrives at rank r: s + 1 … r - 1. */
inline sum_up(shard_) {
  d_step {
    ranks = 0;
    q = ((shard_) + 1) % N;
    do
    :: q == r -> break
    :: else -> ranks = ranks | 1 << q; q = (q + 1) % N
    od;
    q = 0
  }
}

proctype Rank(byte r) {
  byte epoch = START, sent_ = START, received = START;
  byte number, round, k, q, shard, ranks, kind;
  bit committed, finite, refuse;

  do
  :: number == AVERAGES -> break
  :: else ->
    /* the entry barrier */
    d_step { epoch = (epoch + 1) & 7; committed = 0; kind = OPEN; refuse = 0; written[r] = 0 };
    may_die;
    if :: ARRIVES_EARLY -> arrived[r] = epoch :: else fi;
    if :: RECORD(r) = 2 * epoch :: RECORD(r) = 2 * epoch + 1 fi;
    arrived[r] = epoch;
    q = 0;
    do
    :: q == N || (NO_ENTRY_BARRIER && q == N - 1) -> break
    :: else -> await(REACHED(arrived[q], epoch)); q++
    od;
    q = 0;
    do
    :: q == N -> break
    :: else -> d_step { assert(RECORD(q) >> 1 == epoch); refuse = refuse | (RECORD(q) & 1); q++ }
    od;
    if
    :: refuse ->
      decide(REFUSED);
      ends(kind);
      if :: kind == TIMEOUT -> goto departed :: else -> goto next_average fi
    :: else
    fi;

    /* the reduce */
    if :: VOTES_EARLY -> votes() :: else fi;
    round = 0;
    do
    :: round == ROUNDS -> break
    :: else ->
      step(0, 0, 1, CHUNK(0, round, PREVIOUS, 1 << r));
      k = 1;
      do
      :: k == N - 1 -> break
      :: else ->
        shard = (r + N + N - 1 - k) % N;
        sum_up(shard);
        step(1, CHUNK(0, round, shard, ranks), 1, CHUNK(0, round, shard, ranks | 1 << r));
        k++
      od;
      sum_up(r);
      step(1, CHUNK(0, round, r, ranks), 0, 0);
      round++
    od;

    /* the commit vote */
    may_die;
    if
    :: VOTES_EARLY
    :: !VOTES_EARLY -> votes()
    :: !VOTES_EARLY -> vote[r] = (2 * epoch + 1) & 7
    fi;
    q = 0;
    finite = 1;
    do
    :: q == N || NO_VOTE -> break
    :: else ->
      await(REACHED(vote[q], 2 * epoch));
      if :: vote[q] == ((2 * epoch + 1) & 7) && !BAD_VOTE_IGNORED -> finite = 0 :: else fi;
      q++
    od;
    q = 0;
    if :: finite -> decide(COMMITTED) :: else -> decide(NON_FINITE) fi;
    ends(kind);
    if
    :: kind == TIMEOUT -> goto departed
    :: kind == NON_FINITE -> goto next_average
    :: else -> committed = 1
    fi;

    /* the gather */
    round = 0;
    do
    :: round == ROUNDS -> break
    :: else ->
      step(0, 0, 1, CHUNK(1, round, r, ALL_RANKS));
      writes(r);
      k = 1;
      do
      :: k == N - 1 -> break
      :: else ->
        shard = (r + N - k) % N;
        step(1, CHUNK(1, round, shard, ALL_RANKS), 1, CHUNK(1, round, shard, ALL_RANKS));
        writes(shard);
        k++
      od;
      step(1, CHUNK(1, round, NEXT, ALL_RANKS), 0, 0);
      writes(NEXT);
      round++
    od;
    assert(written[r] == (1 << (ROUNDS * N)) - 1);
next_average:
    skip;
    d_step {
      number++;
      round = 0; k = 0; q = 0; shard = 0; ranks = 0; kind = OPEN; finite = 0; refuse = 0
    }
  od;
departed:
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
