// Package cni makes the networks of sandboxes with CNI plugins, by libcni.
//
// # What is kept
//
// A plan, which the caller keeps, holds whole: each network's configuration
// list as it was when the sandbox was made, the capability arguments, CNI_ARGS and the
// interface's name. DEL and CHECK run with that, whatever became of the configuration
// directory. What a plugin printed at ADD is in libcni's cache, under Options.Root
// and not in /var/lib/cni/results, which other runtimes share. The cache is not
// needed: a DEL without a previous result is one that plugins must understand.
// The path of the network namespace in it is never read, since it names a
// process that may long be another.
//
// CNI_CONTAINERID is the sandbox's id, and CNI_NETNS a descriptor of this
// process in /proc.
//
// # Plugins
//
// Each runs in a process group of its own, for at most Options.Timeout, and is
// killed with all that it started when that is over or the context is done. It
// bears the installation's mark in its environment, so that those which a killed
// daemon has left can be found: Open kills them, since one that goes on
// allocating after its DEL has run would leak.
//
// ADD stops at the first plugin that fails, as libcni does. DEL does not: each plugin
// of the chain is called, in reverse order, and the errors are joined. One that gives
// an address back waits until those before it have succeeded, though: see [Driver.Detach].
//
// # GC
//
// Plugins free what is not in the list that they get, for the network of that
// name, whoever made it. So the verb is only sent for networks that we have attachments
// in, with all of them, while no ADD and no DEL runs. A network that other runtimes use
// too must have disableGC set, as the specification says.
//
// # Concurrency
//
// A Driver's methods may be called from several goroutines, but not at the same
// time for one id. Attach and Detach of different ids wait for nothing of ours
// but a GC.
package cni
