/* Loaded into a process, it aborts that when it is torn down (status -6, whatever the process had said), as a process
   group's threads do whose other end has gone first. */
#include <stdlib.h>

__attribute__((destructor)) static void torn_down(void) { abort(); }
