// Package sandboxdv1 is the generated code of the native API, version 1. The
// proto file beside it is the API's reference.
package sandboxdv1

//go:generate ./generate.sh
