// Package archtest holds the tests that keep the project as it was designed:
// which package may import which, which may do what the others must not, and
// that each says what it is for.
package archtest
