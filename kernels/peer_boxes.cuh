// How blocks of several cards add up what each has a part of, number by number as they are ready: a rank
// writes its part into a box of every rank, a float and a mark in one word, and takes from its own box
// what all have written there, in the order of the ranks, so all get the same bits.
//
// A launch is a round; marks tell rounds apart. Two places per number and rank suffice: a rank writes
// for round n + 2 after its launch of round n + 1, which took what this one wrote after its round n.
//
// Compile-time: RANKS. All blocks of a launch run at once, for they wait for blocks of other cards.

struct Peers {
    const u64 *boxes; // [RANKS] addresses, of a box of each rank: [2][RANKS][size] floats and marks
    u32 *rounds;      // [2]: the rounds that all blocks began, the blocks that have begun the next one
    int rank, size;
};

// What a thread keeps of a round: no address is to be asked for when a sum is there.
struct Round {
    u32 number, mark;    // no box begins with a mark
    u64 *given[RANKS];   // where this rank writes, in the boxes of all
    const u64 *own;      // [RANKS][size], what came to this rank
    int size;
};

DEVICE Round begin_round(const Peers &peers) {
    Round round;
    round.number = peers.rounds[0] + 1u, round.mark = 2u * round.number + 1u, round.size = peers.size;
    u64 half = (u64)(round.number & 1u) * RANKS * (u32)peers.size;
#pragma unroll
    for (int other = 0; other < RANKS; ++other)
        round.given[other] = (u64 *)peers.boxes[other] + half + (u64)peers.rank * (u32)peers.size;
    round.own = (const u64 *)peers.boxes[peers.rank] + half;
    return round;
}

// Of one thread of a block, when all its threads have begun the round.
DEVICE u32 take_turn(const Peers &peers) { return count_up(peers.rounds + 1); }

// Of that thread, later, for a turn takes long to be told: the last block's round is over for the next launch.
DEVICE void end_turn(const Peers &peers, const Round &round, u32 turn) {
    if (turn + 1u == gridDim.x * gridDim.y * gridDim.z) peers.rounds[0] = round.number, peers.rounds[1] = 0;
}

DEVICE void give_peers(const Round &round, int number, float part) {
#pragma unroll
    for (int other = 0; other < RANKS; ++other) store_marked_far(round.given[other] + number, part, round.mark);
}

DEVICE float sum_of_peers(const Round &round, int number) {
    float part[RANKS], sum = 0.0f;
    u32 mark[RANKS];
#pragma unroll
    for (int from = 0; from < RANKS; ++from)
        mark[from] = load_marked_far(round.own + (u64)from * (u32)round.size + number, &part[from]);
#pragma unroll
    for (int from = 0; from < RANKS; ++from) {
        while (mark[from] != round.mark)
            mark[from] = load_marked_far(round.own + (u64)from * (u32)round.size + number, &part[from]);
        sum += part[from];
    }
    return sum;
}
