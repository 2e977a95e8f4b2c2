package models

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/tollkeeper/tollkeeper/pkg/gate/refusal"
)

func TestBodiesThatAreReadForTheirModelsAreBoundedTogether(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		bodies := NewRoom(3 * roomStep)
		body := `{"model":"big","x":"` + strings.Repeat("y", 3*roomStep/2) + `"}`
		read := func(ctx context.Context) error {
			r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/", strings.NewReader(body))
			_, err := InBody(r, "model", 16<<20, bodies)
			return err
		}
		first, over := context.WithCancel(t.Context())
		if err := read(first); err != nil {
			t.Fatal(err)
		}
		second, secondOver := context.WithCancel(t.Context())
		var f *refusal.Refusal
		if err := read(second); !errors.As(err, &f) || f.HTTPStatus() != http.StatusServiceUnavailable {
			t.Errorf("there is no room for two: %v", err)
		}
		over()
		secondOver()
		synctest.Wait()
		if n := bodies.used.Load(); n != 0 {
			t.Errorf("%d bytes are not free again", n)
		}
		if err := read(t.Context()); err != nil {
			t.Error(err)
		}
	})
}
