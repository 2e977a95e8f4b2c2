package leftovers

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/tollkeeper/tollkeeper/pkg/ledger"
	"github.com/tollkeeper/tollkeeper/services/internal/embednats"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const bucket = "store"

type world struct {
	t       *testing.T
	server  *embednats.Server
	js      jetstream.JetStream
	objects jetstream.ObjectStore
}

func newWorld(t *testing.T) *world {
	t.Helper()
	s, err := embednats.Start(t.Context(), embednats.Options{StoreDir: t.TempDir(), Logger: zerolog.Nop(), Sync: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, server: s}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	nc := w.connect()
	if w.js, err = jetstream.New(nc); err != nil {
		t.Fatal(err)
	}
	if w.objects, err = w.js.CreateObjectStore(t.Context(), jetstream.ObjectStoreConfig{Bucket: bucket}); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) connect() *nats.Conn {
	w.t.Helper()
	nc, err := nats.Connect(w.server.ClientURL(), nats.NoReconnect())
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(nc.Close)
	return nc
}

// upload is one whose maker gives what it has bit by bit.
type upload struct {
	nc      *nats.Conn
	in      *io.PipeWriter
	subject string
	err     chan error
}

// begin starts an upload; its first chunks are stored when it returns.
func (w *world) begin(name string) *upload {
	w.t.Helper()
	before := w.chunks()
	out, in := io.Pipe()
	u := &upload{nc: w.connect(), in: in, err: make(chan error, 1)}
	js, err := jetstream.New(u.nc)
	if err != nil {
		w.t.Fatal(err)
	}
	objects, err := js.ObjectStore(w.t.Context(), bucket)
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(w.t.Context())
	go func() {
		defer cancel()
		_, err := objects.Put(ctx, jetstream.ObjectMeta{Name: name, Opts: &jetstream.ObjectMetaOptions{ChunkSize: 1000}}, out)
		u.err <- err
	}()
	w.t.Cleanup(func() { _ = in.CloseWithError(io.ErrUnexpectedEOF) }) // it may have ended
	u.write(w.t, 3000)
	w.eventually("its chunks are stored", func() bool {
		for subject, n := range w.chunks() {
			if before[subject] == 0 && n == 3 {
				u.subject = subject
			}
		}
		return u.subject != ""
	})
	return u
}

func (u *upload) write(t *testing.T, n int) {
	t.Helper()
	if _, err := u.in.Write(make([]byte, n)); err != nil {
		t.Fatal(err)
	}
}

// dies without a word, as by kill -9: what it would still say does not arrive.
func (u *upload) dies(t *testing.T) {
	t.Helper()
	u.nc.Close()
	_ = u.in.CloseWithError(io.ErrUnexpectedEOF) // always nil
	if err := <-u.err; err == nil {
		t.Error("an upload without a connection succeeds")
	}
}

func (w *world) chunks() map[string]uint64 { return w.subjects("$O." + bucket + ".C.>") }

func (w *world) subjects(filter string) map[string]uint64 {
	w.t.Helper()
	s, err := w.js.Stream(w.t.Context(), "OBJ_"+bucket)
	if err != nil {
		w.t.Fatal(err)
	}
	info, err := s.Info(w.t.Context(), jetstream.WithSubjectFilter(filter))
	if err != nil {
		w.t.Fatal(err)
	}
	return info.State.Subjects
}

func (w *world) newest(subject string) time.Time {
	w.t.Helper()
	m, found, err := ledger.LastMessage(w.t.Context(), w.js, "OBJ_"+bucket, subject)
	if err != nil || !found {
		w.t.Fatalf("%s: %v, found %v", subject, err, found)
	}
	return m.Time
}

func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	deadline := time.After(15 * time.Second)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			w.t.Fatalf("it did not come to pass that %s", what)
		}
	}
}

func at(now time.Time) func(time.Time) time.Time { return func(time.Time) time.Time { return now } }

// Of three uploads one is whole, one died in the middle and one goes on: after the
// dead one's time only its chunks are gone, and the one that goes on comes to its end.
func TestWhatAnUploadThatDiedHasLeftBehindIsRemovedAndOneThatGoesOnIsNot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	whole := bytes.Repeat([]byte("x"), 300_000)
	if _, err := w.objects.PutBytes(t.Context(), "whole", whole); err != nil {
		t.Fatal(err)
	}
	dead := w.begin("dead")
	running := w.begin("running") // its first chunks are as old
	dead.dies(t)
	w.eventually("another moment has come", func() bool {
		if _, err := w.js.Publish(t.Context(), "$O."+bucket+".C.clock", nil); err != nil {
			t.Fatal(err)
		}
		return w.newest("$O." + bucket + ".C.clock").After(w.newest(dead.subject))
	})
	running.write(t, 1000)
	w.eventually("it goes on", func() bool { return w.chunks()[running.subject] == 4 })

	// By the service's bound nothing is old yet.
	if swept, err := Sweep(t.Context(), w.js, bucket, Age); err != nil || swept != (Swept{}) {
		t.Errorf("removed too early: %+v, %v", swept, err)
	}
	if swept, err := sweep(t.Context(), w.js, bucket, at(w.newest(dead.subject))); err != nil || swept != (Swept{}) {
		t.Errorf("removed at its very age: %+v, %v", swept, err)
	}
	swept, err := sweep(t.Context(), w.js, bucket, at(w.newest("$O."+bucket+".C.clock")))
	if err != nil || swept != (Swept{Uploads: 1}) {
		t.Errorf("removed %+v, %v", swept, err)
	}
	if left := w.chunks(); left[dead.subject] != 0 || left[running.subject] != 4 {
		t.Errorf("left are %v", left)
	}
	running.write(t, 500)
	if err := running.in.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-running.err; err != nil {
		t.Errorf("the upload that went on: %v", err)
	}
	for name, size := range map[string]int{"whole": len(whole), "running": 4500} {
		if data, err := w.objects.GetBytes(t.Context(), name); err != nil || len(data) != size {
			t.Errorf("%s: %d bytes, %v", name, len(data), err)
		}
	}
}

func TestDeletedObjectsAreForgottenAndThoseThatAreThereStay(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, name := range []string{"deleted", "there", "again"} {
		if _, err := w.objects.PutBytes(t.Context(), name, []byte("first")); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"deleted", "again"} {
		if err := w.objects.Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	// A name that was deleted is given to another object.
	for _, name := range []string{"there", "again"} {
		if _, err := w.objects.PutBytes(t.Context(), name, []byte("second")); err != nil {
			t.Fatal(err)
		}
	}
	if swept, err := Sweep(t.Context(), w.js, bucket, Age); err != nil || swept != (Swept{}) {
		t.Errorf("removed too early: %+v, %v", swept, err)
	}
	for _, want := range []Swept{{Names: 1}, {}} {
		if swept, err := sweep(t.Context(), w.js, bucket, at(time.Now().Add(time.Hour))); err != nil || swept != want {
			t.Errorf("removed %+v, %v; want %+v", swept, err, want)
		}
	}
	if names := w.subjects("$O." + bucket + ".M.>"); len(names) != 2 {
		t.Errorf("left are %v", names)
	}
	for _, name := range []string{"there", "again"} {
		if data, err := w.objects.GetBytes(t.Context(), name); err != nil || string(data) != "second" {
			t.Errorf("%s: %q, %v", name, data, err)
		}
	}
	if _, err := w.objects.GetBytes(t.Context(), "deleted"); !errors.Is(err, jetstream.ErrObjectNotFound) {
		t.Errorf("deleted: %v", err)
	}
}

// Who dies between replacing an object, or marking it as deleted, and removing the
// chunks of the old one leaves them under a number that no name points to.
func TestChunksOfWhatWasReplacedOrDeletedAreRemoved(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first, err := w.objects.PutBytes(t.Context(), "name", []byte("first"))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.objects.Delete(t.Context(), "name"); err != nil {
		t.Fatal(err)
	}
	old := "$O." + bucket + ".C." + first.NUID
	if _, err := w.js.Publish(t.Context(), old, []byte("first")); err != nil {
		t.Fatal(err)
	}
	if swept, err := sweep(t.Context(), w.js, bucket, at(time.Now().Add(time.Hour))); err != nil || swept != (Swept{Uploads: 1, Names: 1}) {
		t.Errorf("removed %+v, %v", swept, err)
	}
	if left := w.subjects(">"); len(left) != 0 {
		t.Errorf("left are %v", left)
	}
}

// What points where is not guessed: a name that can't be read may be that of any chunk.
func TestNothingIsRemovedWhereANameCannotBeRead(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, subject := range []string{"M.bmFtZQ==", "C.x"} {
		if _, err := w.js.Publish(t.Context(), "$O."+bucket+"."+subject, []byte("no object")); err != nil {
			t.Fatal(err)
		}
	}
	if swept, err := sweep(t.Context(), w.js, bucket, at(time.Now().Add(time.Hour))); err == nil || swept != (Swept{}) {
		t.Errorf("removed %+v, %v", swept, err)
	}
	if n := len(w.chunks()); n != 1 {
		t.Errorf("%d uploads are left", n)
	}
}
