package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/internal/request"
	"github.com/sandboxd/sandboxd/internal/undo"
)

// Why custody was ended, in one word: what an [Observer] is told, and what the
// reason in a [CustodyRelease] begins with.
const (
	releasedTTL     = "ttl"     // the member's own time is over
	releasedMax     = "max"     // too many members were held on this host
	releasedTmpfs   = "tmpfs"   // they held too much memory
	releasedPolicy  = "policy"  // only what had to happen after the exit needed it
	releasedMonitor = "monitor" // somebody has killed it
)

// holds reports whether policy p keeps the root and namespaces of a member that
// has exited with e.
func holds(p Custody, e Exit) bool {
	return p == request.CustodyAlways || p == request.CustodyFailure && (!e.Known || e.Code != 0)
}

// MonitorPolicy is the policy that a member's monitor is told. What is declared
// to happen after the exit needs the root and the namespaces whatever the
// member's own policy says; after that, the [Manager] ends what it does not want.
func (r *MemberRecord) MonitorPolicy() Custody {
	if declares(r) {
		return request.CustodyAlways
	}
	return r.Config.Custody
}

// held reports whether r says that root and namespaces are held. The monitor may
// have been killed since.
func (r *MemberRecord) held() bool {
	return r.Exit != nil && !r.HeldSince.IsZero() && r.Released == nil &&
		(r.State == MemberExited || r.State == MemberCollected)
}

// heldUntil is when custody ends by itself; the zero time is never.
func (r *MemberRecord) heldUntil() time.Time {
	if r.Config.CustodyTTL <= 0 || r.HeldSince.IsZero() {
		return time.Time{}
	}
	return r.HeldSince.Add(r.Config.CustodyTTL)
}

// release ends the custody of a member that has exited; the rest of it stays
// until it is removed. Preconditions: mb.op is held.
func (m *Manager) release(ctx context.Context, mb *memb, word, why string) error {
	err := m.run("custody", "record", func() error {
		return m.writeMember(mb, func(r *MemberRecord) { r.Released = &CustodyRelease{m.now(), word + ": " + why} })
	})
	if err != nil {
		return err
	}
	return m.letGo(ctx, mb, word)
}

// letGo does what the record of a release says. Preconditions: mb.op is held.
func (m *Manager) letGo(ctx context.Context, mb *memb, word string) error {
	r := mb.rec.Load()
	err := m.run("custody", "monitor", func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undo.StepTimeout)
		defer cancel()
		return m.node.KillMonitor(ctx, r)
	})
	if err != nil {
		m.o.Log.Warn("Custody not ended", "sandbox", r.Sandbox, "member", r.ID, "err", err)
		return err
	}
	m.o.Observer.CustodyReleased(word)
	m.o.Log.Info("Custody ended", "sandbox", r.Sandbox, "member", r.ID, "name", r.Config.Name, "reason", r.Released.Reason)
	return nil
}

// custodyInterval is how often custody is looked at although nothing has
// happened: what members hold in memory can grow, by a copy or a joined program.
const custodyInterval = time.Minute

// busyInterval is how long a member is left alone that something else is done to.
const busyInterval = time.Second

// keepCustody starts the goroutine that ends custody when its time is over or too
// much is held.
func (m *Manager) keepCustody() {
	m.wg.Go(func() {
		for {
			wait := m.tendCustody()
			select {
			case <-time.After(wait):
			case <-m.custody:
			case <-m.ctx.Done():
				return
			}
		}
	})
}

// custodyChanged makes the goroutine look now.
func (m *Manager) custodyChanged() {
	select {
	case m.custody <- struct{}{}:
	default: // it will look anyway
	}
}

// heldMember is a member in custody.
type heldMember struct {
	box   *box
	mb    *memb
	rec   *MemberRecord
	tmpfs int64
}

// tendCustody puts on record that the custody of those has ended whose monitor was
// killed, and ends that of those whose time is over and, the oldest first,
// of as many as are too many. It returns after which time there may be more to do.
func (m *Manager) tendCustody() time.Duration {
	wait, now := custodyInterval, m.o.Now()
	var all []heldMember
	for _, b := range m.all() {
		for _, mb := range b.list() {
			r := mb.rec.Load()
			if !r.held() || m.unsettled(mb) {
				continue
			}
			h := heldMember{box: b, mb: mb, rec: r}
			if m.o.alive(r.Monitor) {
				if m.o.CustodyMaxTmpfs > 0 {
					h.tmpfs = m.node.HeldTmpfs(r, m.memberPath(mb))
				}
				all = append(all, h)
			} else if !m.tryRelease(h, releasedMonitor, "it was killed") {
				wait = busyInterval
			}
		}
	}
	slices.SortFunc(all, func(a, b heldMember) int {
		return cmp.Or(a.rec.HeldSince.Compare(b.rec.HeldSince), cmp.Compare(a.rec.ID, b.rec.ID))
	})
	var bytes int64
	rest := all[:0]
	for _, h := range all {
		until := h.rec.heldUntil()
		word, why := h.rec.unwanted()
		if !until.IsZero() && !now.Before(until) {
			word, why = releasedTTL, fmt.Sprintf("%s are over", h.rec.Config.CustodyTTL)
		}
		if word != "" {
			if !m.tryRelease(h, word, why) {
				wait = min(wait, busyInterval)
			}
			continue
		}
		if !until.IsZero() {
			wait = min(wait, until.Sub(now))
		}
		bytes += h.tmpfs
		rest = append(rest, h)
	}
	count := len(rest)
	for _, h := range rest {
		var word, why string
		switch {
		case m.o.CustodyMax > 0 && count > m.o.CustodyMax:
			word, why = releasedMax, fmt.Sprintf("more than %d members were held", m.o.CustodyMax)
		case m.o.CustodyMaxTmpfs > 0 && bytes > m.o.CustodyMaxTmpfs && h.tmpfs > 0:
			word, why = releasedTmpfs, fmt.Sprintf("members held more than %d bytes in memory", m.o.CustodyMaxTmpfs)
		default:
			continue
		}
		if !m.tryRelease(h, word, why) {
			wait = min(wait, busyInterval)
			continue
		}
		count, bytes = count-1, bytes-h.tmpfs
	}
	return max(wait, time.Millisecond)
}

// tryRelease ends the custody of h, unless it has changed or something is being
// done to it, of which it reports the latter as false.
func (m *Manager) tryRelease(h heldMember, word, why string) bool {
	select {
	case h.mb.op <- struct{}{}:
	default:
		return false
	}
	defer h.mb.op.release()
	r := h.mb.rec.Load()
	if h.mb.gone || !r.held() || m.unsettled(h.mb) {
		return true
	}
	return m.release(m.ctx, h.mb, word, why) == nil
}

// finishRelease ends custody that an earlier daemon has put on record as ended.
// Preconditions: mb.op is held.
func (m *Manager) finishRelease(ctx context.Context, mb *memb) {
	if r := mb.rec.Load(); r.Released != nil && m.o.alive(r.Monitor) {
		word, _, _ := strings.Cut(r.Released.Reason, ":")
		m.letGo(ctx, mb, word)
	}
}

// unwanted says why the custody of a member that is held ends at once, if only
// what had to happen after its exit needed it.
func (r *MemberRecord) unwanted() (word, why string) {
	if holds(r.Config.Custody, *r.Exit) || r.Config.AutoRemove {
		return "", ""
	}
	return releasedPolicy, fmt.Sprintf("the member's is %s", r.Config.Custody)
}

// releaseUnwanted ends the custody of a member that nobody wants to be held any
// longer. Preconditions: mb.op is held.
func (m *Manager) releaseUnwanted(ctx context.Context, mb *memb) {
	if r := mb.rec.Load(); r.held() {
		if word, why := r.unwanted(); word != "" {
			m.release(ctx, mb, word, why) // what goes wrong is logged, and done later
		}
	}
}
