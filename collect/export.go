package collect

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// unixStat is what a [fs.FileInfo] of this system holds.
type unixStat = syscall.Stat_t

// Export writes a collection as a tar stream to w: its files below its name.
func (s *Store) Export(name string, w io.Writer) error {
	if err := s.check(name); err != nil {
		return err
	}
	t := tar.NewWriter(w)
	for _, file := range []string{manifestFile, archiveFile} {
		if err := s.exportFile(t, name+"/"+file); err != nil {
			return err
		}
	}
	return t.Close()
}

func (s *Store) exportFile(t *tar.Writer, name string) error {
	f, err := s.root.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() {
		return fmt.Errorf("%s is not a regular file", name)
	}
	err = t.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: fi.Size(), ModTime: fi.ModTime(), Format: tar.FormatPAX})
	if err != nil {
		return err
	}
	_, err = io.Copy(t, io.LimitReader(f, fi.Size()))
	return err
}
