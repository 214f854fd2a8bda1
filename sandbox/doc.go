// Package sandbox owns the lifecycle of pod sandboxes and their members.
package sandbox
