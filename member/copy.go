package member

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/internal/tarstream"
)

// CopyOptions are those of a copy out of or into a member.
type CopyOptions = tarstream.Options

// CopyOut writes a tar stream of the file or directory at path in a member,
// exited or not, whose root is given ([OpenRoot]). See [tarstream.Write].
func CopyOut(ctx context.Context, root *os.File, path string, w io.Writer, o CopyOptions) error {
	return tarstream.Write(ctx, root, path, w, o)
}

// CopyIn unpacks a tar stream into the directory at path in a member. See
// [tarstream.Extract].
func CopyIn(ctx context.Context, root *os.File, path string, r io.Reader, o CopyOptions) error {
	return tarstream.Extract(ctx, root, path, r, o)
}

// CopyInAs unpacks a stream of [CopyOut] or [TarFrom] to path in a member by the
// rules of docker cp. See [tarstream.Copy].
func CopyInAs(ctx context.Context, root *os.File, path string, r io.Reader, o CopyOptions) error {
	return tarstream.Copy(ctx, root, path, r, o)
}

// TarFrom writes a tar stream of the file or directory at src on the host.
// note may be nil.
func TarFrom(ctx context.Context, src string, w io.Writer, note func(path, what string)) error {
	return onHost(src, func(root *os.File, abs string) error {
		return tarstream.Write(ctx, root, abs, w, tarstream.Options{Note: note})
	})
}

// ExtractTo unpacks a stream of [CopyOut] to dest on the host by the rules of
// docker cp, and nowhere else, whatever is in the stream. note may be nil.
func ExtractTo(ctx context.Context, dest string, r io.Reader, note func(path, what string)) error {
	return onHost(dest, func(root *os.File, abs string) error {
		return tarstream.Copy(ctx, root, abs, r, tarstream.Options{Note: note})
	})
}

// onHost makes a path absolute but does not clean it: that it ends in "/" or
// "/." means something.
func onHost(name string, do func(root *os.File, abs string) error) error {
	if name != "" && !filepath.IsAbs(name) {
		wd, err := os.Getwd()
		if err != nil {
			return err
		}
		name = strings.TrimSuffix(wd, "/") + "/" + name
	}
	root, err := os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	return do(root, name)
}
