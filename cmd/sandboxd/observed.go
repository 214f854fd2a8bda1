package main

import (
	"context"
	"encoding/json"
	"os"
	"time"

	"github.com/sandboxd/sandboxd/internal/network"
	"github.com/sandboxd/sandboxd/metrics"
	"github.com/sandboxd/sandboxd/netsetup"
)

// observedDriver tells the metrics of what a network driver does.
type observedDriver struct {
	netsetup.Driver
	mode network.Mode
	mt   *metrics.Metrics
}

// Attach implements [netsetup.Driver].
func (d observedDriver) Attach(ctx context.Context, id string, plan json.RawMessage, ns *os.File) (*network.Result, error) {
	begin := time.Now()
	res, err := d.Driver.Attach(ctx, id, plan, ns)
	d.mt.Network(string(d.mode), "attach", time.Since(begin), err)
	return res, err
}

// Detach implements [netsetup.Driver].
func (d observedDriver) Detach(ctx context.Context, id string, plan json.RawMessage, ns *os.File) error {
	begin := time.Now()
	err := d.Driver.Detach(ctx, id, plan, ns)
	d.mt.Network(string(d.mode), "detach", time.Since(begin), err)
	return err
}

// Verify implements [netsetup.Driver].
func (d observedDriver) Verify(ctx context.Context, id string, plan json.RawMessage, ns *os.File) error {
	begin := time.Now()
	err := d.Driver.Verify(ctx, id, plan, ns)
	d.mt.Network(string(d.mode), "verify", time.Since(begin), err)
	return err
}

// Restore implements [netsetup.Driver].
func (d observedDriver) Restore(ctx context.Context, id string, plan json.RawMessage, ns *os.File) error {
	begin := time.Now()
	err := d.Driver.Restore(ctx, id, plan, ns)
	d.mt.Network(string(d.mode), "restore", time.Since(begin), err)
	return err
}

// counts is what there is of each network driver.
func (n *networks) counts() []metrics.Network {
	attached, buried := n.store.Counts()
	oldest := map[network.Mode]time.Time{}
	for _, t := range n.store.Tombstones() { // the oldest first
		if _, ok := oldest[t.Mode]; !ok {
			oldest[t.Mode] = t.Since
		}
	}
	var out []metrics.Network
	for mode := range attached {
		out = append(out, metrics.Network{Driver: string(mode), Attached: attached[mode], Tombstones: buried[mode], Oldest: oldest[mode]})
	}
	return out
}

// leases is how many addresses the builtin network has given out.
func (n *networks) leases() []metrics.Leases {
	var out []metrics.Leases
	for _, c := range n.builtin.Counts() {
		out = append(out, metrics.Leases{Family: c.Family, InUse: c.InUse, Free: max(0, c.Total-c.InUse)})
	}
	return out
}
