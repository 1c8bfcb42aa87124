#ifndef QT_TEAM_H
#define QT_TEAM_H
#include <stdint.h>
typedef struct qt_team qt_team;
typedef void (*qt_job)(void *argument, qt_team *team, int64_t thread, int64_t threads);
void qt_team_run(int64_t threads, qt_job job, void *argument);
void qt_team_wait(qt_team *team);
#endif
