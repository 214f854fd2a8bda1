// Package hook knows the programs of the host's that are run at stages of a
// sandbox's or member's life: how they are declared ([Parse] for a flag,
// [FromSpec] for a bundle, [Dirs] for hooks.d directories), what they are told on
// their stdin ([Input]), and how one is run ([Run]).
//
// It does not know when to run which: that is package sandbox's. It keeps
// nothing, and its functions may be called from several goroutines.
package hook
