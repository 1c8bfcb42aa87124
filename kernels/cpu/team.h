#ifndef QT_TEAM_H
#define QT_TEAM_H
#include <stdint.h>
typedef struct qt_team qt_team;
typedef void (*qt_job)(void *argument, qt_team *team, int64_t thread, int64_t threads);
/* As OpenMP has them: what runs a part in each of so many threads, and who a thread is. */
typedef void (*qt_parallel)(void (*part)(void *), void *argument, unsigned threads, unsigned flags);
typedef int (*qt_number)(void);
void qt_team_borrow(qt_parallel run, qt_number thread, qt_number threads);
void qt_team_run(int64_t threads, qt_job job, void *argument);
void qt_team_wait(qt_team *team);
#endif
