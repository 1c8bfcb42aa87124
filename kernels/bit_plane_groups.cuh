// Numbers of a row and group, and groups of a unit: PLANES, GROUP and OFFSET of bit_planes.cuh. May be included twice.
#define PARAMETERS (PLANES + (OFFSET != 0))
// Groups and units divide one another: where a group begins is known to the compiler.
#define REGULAR (GROUP % UNIT == 0 || UNIT % GROUP == 0)
// Groups that a unit may touch.
#define SPAN (GROUP % UNIT == 0 ? 1 : UNIT % GROUP == 0 ? UNIT / GROUP : (GROUP - 32 + UNIT - 1) / GROUP + 1)
