package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
)

// Networks lists what sandboxes can be attached to, the default network first.
func (d *Driver) Networks() []Network { return slices.Clone(d.conf.current().networks) }

// Problems lists the files of the configuration directory that cannot be used.
func (d *Driver) Problems() []Problem { return slices.Clone(d.conf.current().problems) }

// Status reports why the default network cannot be made now: there is none, a
// plugin is missing or does not know the configuration's version, or STATUS of one (from
// version 1.1.0) says so. What is wrong with other files [Driver.Problems] tells.
func (d *Driver) Status(ctx context.Context) error {
	n, err := d.conf.current().find("")
	if err != nil {
		return err
	}
	list, err := parseList(n.raw)
	if err != nil {
		return fmt.Errorf("network %s: %w", n.Name, err)
	}
	var errs []error
	for _, p := range list.Plugins {
		if err := d.known.check(ctx, d, p.Network.Type, list.CNIVersion); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("network %s: %w", n.Name, err)
	}
	if err := d.status(ctx, list); err != nil {
		return fmt.Errorf("network %s: %w", n.Name, err)
	}
	return nil
}

func (d *Driver) status(ctx context.Context, list *libcni.NetworkConfigList) error {
	return d.cni.GetStatusNetworkList(ctx, list)
}

// versions remembers which versions of the specification plugins know. What a
// program said is asked again when its file has changed.
type versions struct {
	mu  sync.Mutex
	all map[string]knownVersions // by file; guarded by mu
}

type knownVersions struct {
	size    int64
	changed time.Time
	list    []string
}

// check reports why a plugin cannot be run with a configuration of the version want.
func (v *versions) check(ctx context.Context, d *Driver, plugin, want string) error {
	file, err := d.exec.FindInPath(plugin, d.o.BinDirs)
	if err != nil {
		return err
	}
	list, err := v.of(ctx, d, file)
	if err != nil {
		return fmt.Errorf("plugin %s: %w", plugin, err)
	}
	if !slices.Contains(list, want) {
		return fmt.Errorf("plugin %s knows versions %s, and not the configuration's %s", file, strings.Join(list, ", "), want)
	}
	return nil
}

// suits is check for what is about to be attached: a plugin that does not know the
// version would refuse the DEL as well, for ever. What else is wrong with it, ADD tells.
func (v *versions) suits(ctx context.Context, d *Driver, plugin, want string) error {
	err := v.check(ctx, d, plugin, want)
	if _, failed := errors.AsType[*versionError](err); failed {
		return nil
	}
	return err
}

// of asks a plugin which versions it knows, unless it has told already.
func (v *versions) of(ctx context.Context, d *Driver, file string) ([]string, error) {
	fi, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	k, ok := v.all[file]
	v.mu.Unlock()
	if ok && k.size == fi.Size() && k.changed.Equal(fi.ModTime()) {
		return k.list, nil
	}
	info, err := invoke.GetVersionInfo(ctx, file, d.exec)
	if err != nil {
		return nil, &versionError{err}
	}
	k = knownVersions{fi.Size(), fi.ModTime(), info.SupportedVersions()}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.all == nil {
		v.all = map[string]knownVersions{}
	}
	v.all[file] = k
	return k.list, nil
}

// versionError means that a plugin did not tell which versions it knows.
type versionError struct{ error }

func (e *versionError) Unwrap() error { return e.error }
