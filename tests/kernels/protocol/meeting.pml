/* The meeting of ranks that are threads, before an average on devices (all_gather in
 * src/backend/meeting.rs, launch_together in src/backend/cuda/rank.rs), for spin: N ranks on two
 * devices each make AVERAGES averages. They meet on the host; the first rank of a device launches
 * for all on it; all wait for all launches, then for their device. model.rs runs it.
 *
 *   HEALTHY     no rank fails: every average must end
 *   otherwise   a rank may leave or be stopped for good between two averages, a kernel may fail on
 *               one rank alone, a driver may refuse a launch, half of which may be under way, and
 *               the world may be aborted at any moment. In half of the runs deadlines pass at any
 *               moment; in the others only where a rank was stopped, so that every other wait must
 *               end by itself. Kernels have no deadline of their own: no wait may need it.
 *
 * No rank may launch a meeting that another one gave up, no rank may return while a launch uses its
 * tensors, and every rank must end. FAULT plants one mistake; spin must find each.
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

#define STAYS_BROUGHT (FAULT == 1)      /* a rank gives up a meeting that others can complete */
#define FAILURE_FIRST (FAULT == 2)      /* a failure counts although the meeting is complete */
#define GIVES_UP_UNLOCKED (FAULT == 3)  /* a rank gives up after it has released the lock */
#define LAUNCHES_UNAWAITED (FAULT == 4) /* a rank does not wait for its device's launch */
#define REFUSED_IN_SILENCE (FAULT == 5) /* a refused launch does not end the world at once */
#define RETURNS_AT_ONCE (FAULT == 6)    /* a refused launch is not waited for */
#define ABORTS_IGNORED (FAULT == 7)     /* a rank that waits does not look at the world's failure */
#define LEAVERS_IGNORED (FAULT == 8)    /* a rank that waits does not look for ranks that left */
#define FAILURE_KEPT (FAULT == 9)       /* a rank whose kernel failed does not tell the hosts */

#define DEVICE(r) ((r) * 2 / N)
#define FIRST(d) (((d) * N + 1) / 2)

bit brought[N], left[N];
byte complete;     /* meetings */
byte came;         /* ranks at the second meeting, in all averages */
bit ended;         /* failure of the world, as hosts see it */
byte launched[2];  /* averages whose kernel was launched on a device */
bit running[2], refused[2];

/* State of the model alone. */
bit gave_up[AVERAGES], went_on[AVERAGES], in_call[N], used[N];
bit somebody_stopped, impatient;

#define all_brought (brought[0] && brought[1] && brought[N - 1])
#define missing_left(q) (q < N && !brought[q] && left[q])
#define someone_left (missing_left(0) || missing_left(1) || missing_left(N - 1))

inline gives_up(k) {
  atomic { assert(!went_on[k]); gave_up[k] = 1 }
}
/* The tensors of all ranks on a device. */
inline uses(d, flag) {
  q = 0;
  do
  :: q == N -> break
  :: else ->
    if :: DEVICE(q) == d -> assert(in_call[q]); used[q] = flag :: else fi;
    q++
  od;
  q = 0
}

/* Kernels of one device. */
proctype Device(byte d) {
  byte q;
end_idle:
  do
  :: running[d] ->
    /* The other half of the average runs, or the world has ended. */
    (launched[1 - d] >= launched[d] && launched[d] > 0 && !refused[d]) || ended;
    d_step { uses(d, 0); running[d] = 0 }
  od
}

proctype Rank(byte r) {
  byte k, q;
  byte d = DEVICE(r);
  do
  :: k == AVERAGES -> break
  :: else ->
#ifndef HEALTHY
    if
    :: skip
    :: gives_up(k); left[r] = 1; goto done
    :: atomic { !somebody_stopped -> somebody_stopped = 1; gives_up(k); goto end_stopped }
    fi;
#endif
    in_call[r] = 1;
    atomic { /* under the lock */
      if
      :: ended && !STAYS_BROUGHT -> gives_up(k); goto failed
      :: else ->
        brought[r] = 1;
        if
        :: all_brought ->
          brought[0] = 0; brought[1] = 0; brought[N - 1] = 0;
          complete++
        :: else
        fi
      fi
    };
    do
    :: complete > k -> break
    :: atomic {
        complete <= k && ((ended && !ABORTS_IGNORED) || (someone_left && !LEAVERS_IGNORED)) ->
        ended = 1;
        if :: !STAYS_BROUGHT -> brought[r] = 0 :: else fi;
        gives_up(k);
        goto failed
      }
    :: atomic {
        complete <= k && (somebody_stopped || impatient) && !GIVES_UP_UNLOCKED ->
        ended = 1;
        if :: !STAYS_BROUGHT -> brought[r] = 0 :: else fi;
        gives_up(k);
        goto failed
      }
    :: GIVES_UP_UNLOCKED && complete <= k && (somebody_stopped || impatient) ->
      ended = 1;
      brought[r] = 0;
      gives_up(k);
      goto failed
    :: FAILURE_FIRST && ended -> gives_up(k); goto failed
    od;
    skip; /* spin does not jump into a d_step */
    d_step { assert(!gave_up[k]); went_on[k] = 1 };

    if
    :: r == FIRST(d) ->
      if
      :: d_step { uses(d, 1); running[d] = 1; launched[d] = launched[d] + 1 }
#ifndef HEALTHY
      :: refused[d] = 1;
        if :: skip :: d_step { uses(d, 1); running[d] = 1 } fi;
        if :: !REFUSED_IN_SILENCE -> ended = 1 :: else fi;
        if :: !RETURNS_AT_ONCE -> !running[d] :: else fi
#endif
      fi
    :: else
    fi;
    came++;
    if :: !LAUNCHES_UNAWAITED -> came >= N * (k + 1) :: else fi;
    if
    :: refused[d] -> ended = 1; goto failed
    :: else -> !running[d]
    fi;
#ifndef HEALTHY
    if
    :: skip
    :: skip; if :: !FAILURE_KEPT -> ended = 1 :: else fi; goto failed
    fi;
#endif
    skip;
    d_step { assert(!used[r]); in_call[r] = 0; k++ }
  od;
  goto done;
failed:
  skip;
  d_step { assert(!used[r]); in_call[r] = 0 };
  if :: k + 1 < AVERAGES -> gives_up(k + 1) :: else fi;
  if :: skip :: left[r] = 1 fi;
  goto done;
end_stopped:
  false; /* for ever */
done:
  skip
}

init {
  atomic {
    byte i;
#ifndef HEALTHY
    if :: skip :: impatient = 1 fi;
#endif
    run Device(0);
    run Device(1);
    do
    :: i == N -> break
    :: else -> run Rank(i); i++
    od
  }
#ifndef HEALTHY
  if :: skip :: ended = 1 fi
#endif
}
