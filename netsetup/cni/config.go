package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"golang.org/x/sys/unix"
)

// supported are the versions of configurations that sandboxes can be made with.
// 0.3.0 differs from 0.3.1 by a mistake in the specification; older ones have no lists.
var supported = []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}

// maxName bounds a network's name. libcni's cache has a file NETWORK-ID-INTERFACE, and a
// file's name has at most 255 bytes.
const maxName = 200

// maxConfig bounds a file of the configuration directory.
const maxConfig = 1 << 20

// Network is a network that the configuration directory has.
type Network struct {
	Name    string
	File    string // its name in the directory
	Version string // cniVersion
	Plugins []string

	raw json.RawMessage // a configuration list, with the plugins of all files
}

// Problem is a file of the configuration directory that cannot be used.
type Problem struct {
	File string // its name in the directory
	Err  error
}

func (p Problem) Error() string { return p.File + ": " + p.Err.Error() }

// Unwrap returns the reason.
func (p Problem) Unwrap() error { return p.Err }

// config is what a configuration directory says. It is not changed once it is made.
type config struct {
	dir      string
	networks []Network // by file name; the first one is the default
	problems []Problem
}

// find returns the network called name, or the default one if name is empty.
func (c *config) find(name string) (*Network, error) {
	for i := range c.networks {
		if name == "" || c.networks[i].Name == name {
			return &c.networks[i], nil
		}
	}
	var why strings.Builder
	for _, p := range c.problems {
		fmt.Fprintf(&why, "; %v", p)
	}
	if name == "" {
		return nil, fmt.Errorf("there is no CNI network in %s%s", c.dir, &why)
	}
	var have []string
	for _, n := range c.networks {
		have = append(have, n.Name)
	}
	if len(have) == 0 {
		have = []string{"none"}
	}
	return nil, fmt.Errorf("there is no CNI network %q in %s, which has: %s%s", name, c.dir, strings.Join(have, ", "), &why)
}

// load reads a configuration directory, in the order of file names, as other
// runtimes do. One that does not exist is empty.
func load(dir string) *config {
	c := &config{dir: dir}
	entries, err := os.ReadDir(dir)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			c.problems = []Problem{{".", err}}
		}
		return c
	}
	file := map[string]string{} // by network
	for _, e := range entries {
		name := e.Name()
		if !slices.Contains([]string{".conflist", ".conf", ".json"}, filepath.Ext(name)) || e.IsDir() {
			continue
		}
		n, err := loadFile(dir, name)
		if err == nil && file[n.Name] != "" {
			err = fmt.Errorf("network %q is in %s already", n.Name, file[n.Name])
		}
		if err != nil {
			c.problems = append(c.problems, Problem{name, err})
			continue
		}
		file[n.Name] = name
		c.networks = append(c.networks, *n)
	}
	return c
}

func loadFile(dir, name string) (*Network, error) {
	data, err := readFile(filepath.Join(dir, name))
	if err != nil {
		return nil, err
	}
	n, err := parse(data, func(network string) ([]json.RawMessage, error) {
		return pluginFiles(filepath.Join(dir, network))
	})
	if err != nil {
		return nil, err
	}
	n.File = name
	return n, nil
}

// pluginFiles reads the plugins of a network that are in files of their own, in
// a directory that is called as the network (specification 1.1, "loadOnlyInlinedPlugins").
func pluginFiles(dir string) ([]json.RawMessage, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.conf")) // sorted; network names have no metacharacters
	if err != nil {
		return nil, err
	}
	var plugins []json.RawMessage
	for _, f := range files {
		data, err := readFile(f)
		if err != nil {
			return nil, err
		}
		if !json.Valid(data) {
			return nil, fmt.Errorf("%s is not JSON", f)
		}
		plugins = append(plugins, data)
	}
	return plugins, nil
}

// readFile reads a file of bounded size; a FIFO does not make it wait.
func readFile(name string) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil {
		return nil, err
	} else if !fi.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
	if err == nil && len(data) > maxConfig {
		err = fmt.Errorf("larger than %d bytes", maxConfig)
	}
	return data, err
}

// parse understands a configuration list, or the configuration of one plugin,
// which becomes a list. more returns the plugins of a network in other files.
func parse(data []byte, more func(network string) ([]json.RawMessage, error)) (*Network, error) {
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(data, &raw); err != nil {
		return nil, err
	}
	if raw == nil {
		return nil, errors.New("not a JSON object")
	}
	if _, single := raw["type"]; single && raw["plugins"] == nil {
		raw = map[string]json.RawMessage{"name": raw["name"], "cniVersion": raw["cniVersion"], "plugins": join([]json.RawMessage{data})}
		for k, v := range raw {
			if v == nil {
				delete(raw, k)
			}
		}
	} else if err := addFiles(raw, more); err != nil {
		return nil, err
	}
	list, err := json.Marshal(raw)
	if err != nil {
		return nil, err
	}
	l, err := parseList(list)
	if err != nil {
		return nil, err
	}
	if len(l.Name) > maxName {
		return nil, fmt.Errorf("network name %.20q… has %d bytes, more than %d", l.Name, len(l.Name), maxName)
	}
	n := &Network{Name: l.Name, Version: l.CNIVersion, raw: list}
	for _, p := range l.Plugins {
		n.Plugins = append(n.Plugins, p.Network.Type)
	}
	return n, nil
}

// addFiles adds to a list the plugins of other files, unless it says that there
// are none, and makes it one that stands for itself.
func addFiles(raw map[string]json.RawMessage, more func(network string) ([]json.RawMessage, error)) error {
	var only, name string
	if json.Unmarshal(raw["name"], &name) != nil || utils.ValidateNetworkName(name) != nil {
		return nil // refused later, with the reason
	}
	_ = json.Unmarshal(raw["loadOnlyInlinedPlugins"], &only)
	if string(raw["loadOnlyInlinedPlugins"]) == "true" || strings.EqualFold(only, "true") {
		return nil
	}
	var plugins []json.RawMessage
	if raw["plugins"] != nil && json.Unmarshal(raw["plugins"], &plugins) != nil {
		return nil
	}
	added, err := more(name)
	if err != nil || len(added) == 0 {
		return err
	}
	raw["plugins"] = join(append(plugins, added...))
	raw["loadOnlyInlinedPlugins"] = json.RawMessage("true")
	return nil
}

func join(vs []json.RawMessage) json.RawMessage {
	b := []byte{'['}
	for i, v := range vs {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, v...)
	}
	return append(b, ']')
}

// parseList checks a configuration list, beyond what libcni does.
func parseList(data []byte) (*libcni.NetworkConfigList, error) {
	l, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	if err := utils.ValidateNetworkName(l.Name); err != nil {
		return nil, err
	}
	if !slices.Contains(supported, l.CNIVersion) {
		return nil, fmt.Errorf("cniVersion %q is not one of %s", l.CNIVersion, strings.Join(supported, ", "))
	}
	if len(l.Plugins) == 0 {
		return nil, errors.New("no plugins")
	}
	for _, p := range l.Plugins {
		if strings.ContainsRune(p.Network.Type, os.PathSeparator) {
			return nil, fmt.Errorf("plugin type %q is not the name of a program", p.Network.Type)
		}
	}
	return l, nil
}
