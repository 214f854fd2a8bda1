// Package crash ends the process at named points, so that a test can see what
// a restart makes of a daemon that was killed there.
//
// In a binary built without the tag crashpoints, [Point] is empty and costs
// nothing. With the tag two environment variables steer it:
//
//   - SANDBOXD_CRASH_LOG: a file to which the name of every point that is passed
//     is appended, one a line; a test learns from it which points there are;
//   - SANDBOXD_CRASH_AT: "NAME" or "NAME#N"; the process sends itself SIGKILL
//     when it comes to that point for the first or N-th time.
package crash
