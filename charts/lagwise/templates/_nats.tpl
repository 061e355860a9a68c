{{/* The server's configuration. Passwords come as environment variables from the Secret. */}}
{{- define "lagwise.natsConf" -}}
{{- $nats := .Values.nats -}}
server_name: $POD_NAME
port: 4222
http_port: 8222
max_payload: {{ $nats.maxPayload }}
# A slow reader may hold a burst of large messages before the server cuts it off.
max_pending: 256MB
jetstream {
  store_dir: "/data"
  # Streams reserve config.bus.max_stream_bytes each: what does not fit is refused at the start.
  max_file_store: {{ $nats.storage.size }}
  sync_interval: {{ $nats.syncInterval | quote }}
}
{{- if $nats.tls.secretName }}
tls {
  cert_file: "/etc/nats-tls/tls.crt"
  key_file: "/etc/nats-tls/tls.key"
}
{{- end }}
accounts {
  LAGWISE {
    jetstream: enabled
    users: [
    {{- range $account, $allowed := include "lagwise.permissions" . | fromJson }}
      {
        user: {{ $account }}
        password: $NATS_PASSWORD_{{ upper $account }}
        permissions: {
          publish: { allow: {{ $allowed.publish | toRawJson }} }
          subscribe: { allow: {{ $allowed.subscribe | toRawJson }} }
        }
      }
    {{- end }}
    ]
  }
}
{{- end -}}

{{/* What each account may do, for this run: generated from shared/runtime/nats_permissions.py. */}}
{{- define "lagwise.permissions" -}}
{{- .Files.Get "files/nats-permissions.json" | replace "RUN" (include "lagwise.runName" .) -}}
{{- end -}}

{{- define "lagwise.accounts" -}}
{{- include "lagwise.permissions" . | fromJson | keys | sortAlpha | join " " -}}
{{- end -}}
