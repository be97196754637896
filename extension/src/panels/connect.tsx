// Another server than this machine's: an address, and its access token.
import * as React from 'react';
import type { PartProps } from './parts';

export function Connect(
  props: PartProps & { readonly close: () => void }
): React.ReactElement {
  const { trans, perform } = props;
  const [address, setAddress] = React.useState(
    props.view.snapshot?.address ?? ''
  );
  const [token, setToken] = React.useState('');
  const first = React.useRef<HTMLInputElement>(null);
  React.useEffect(() => first.current?.focus(), []);
  return (
    <form
      className="jp-Djinn-form"
      aria-label={trans.__('connect to a server')}
      onSubmit={event => {
        event.preventDefault();
        // the token is given on, and kept nowhere here
        void perform('connect', {
          ...(address ? { address } : {}),
          ...(token ? { token } : {})
        });
        props.close();
      }}
    >
      <label>
        {trans.__('Address')}
        <input
          ref={first}
          type="text"
          placeholder={trans.__('host:port; empty: this machine')}
          value={address}
          onChange={event => setAddress(event.target.value)}
        />
      </label>
      <label>
        {trans.__('Access token')}
        <input
          type="password"
          autoComplete="off"
          placeholder={trans.__('empty: the one kept for it')}
          value={token}
          onChange={event => setToken(event.target.value)}
        />
      </label>
      <div className="jp-Djinn-buttons">
        <button type="submit" className="jp-Djinn-button">
          {trans.__('Connect')}
        </button>
        <button type="button" className="jp-Djinn-button" onClick={props.close}>
          {trans.__('Cancel')}
        </button>
      </div>
    </form>
  );
}
